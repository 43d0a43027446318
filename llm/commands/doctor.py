"""``llmrt doctor``: what this machine is to llmrt."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from . import options as o


def doctor(
    no_measure: Annotated[bool, typer.Option("--no-measure", help="Leave out the probes of speed (4 s).")] = False,
    threads: o.ThreadsOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Print CPU, ISA tier, threads, huge pages, measured peaks and bandwidth, XPU, versions: what a bug report needs.

    Example: llmrt doctor --json > report.json
    """
    o.set_threads(threads)
    from ..doctor import examine

    found = examine(measure=not no_measure)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for row in _rows(found):
        table.add_row(*row)
    Console().print(table)


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, isa, threads, pages = found["cpu"], found["isa"], found["threads"], found["huge_pages"]
    others = [tier for tier in isa["available"] if tier != isa["in_use"]]
    lacking = [tier for tier in isa["compiled"] if tier not in isa["available"]]
    rows = [
        ("CPU", cpu["name"]),
        ("cores", f"{cpu['cores']} physical, {cpu['logical_cores']} logical, {cpu['usable_cores']} usable"),
        ("memory", f"{cpu['memory_bytes'] / 2**30:.1f} GiB"),
        ("ISA tier", f"{isa['in_use']}: {isa['reason']}"),
        ("", f"also here: {', '.join(others)} (LLMRT_CPU_ISA chooses)" if others else "no other tier here"),
        ("", f"compiled, but not for this CPU or system: {', '.join(lacking) or 'none'}"),
        ("threads", f"{threads['torch']}, OMP_NUM_THREADS {threads['OMP_NUM_THREADS'] or 'not set'}"),
        ("OpenMP", ", ".join(threads["openmp"]) or "none loaded"),
        ("huge pages", f"transparent: {pages['transparent'] or 'unknown'}, reserved: {pages['reserved']}"),
        ("XPU", _xpu(found["xpu"])),
    ]
    if len(threads["openmp"]) > 1:
        rows.insert(8, ("", "two OpenMP runtimes in one process compete for the cores"))
    for count, peaks in found.get("measured", {}).items():
        rows.append((f"{count} thread{'' if count == '1' else 's'}", _peaks(peaks)))
    return [*rows, *((name, text) for name, text in found["versions"].items())]


def _xpu(state: dict[str, Any]) -> str:
    if not state["torch_built_with_xpu"]:
        return "this torch is built without it"
    return ", ".join(state["devices"]) or "no device"


def _peaks(peaks: dict[str, float | None]) -> str:
    parts = []
    for kind, value in peaks.items():
        unit = "GB/s" if kind == "read" else "Gop/s"
        parts.append(f"{kind} no instruction" if value is None else f"{kind} {value / 1e9:.1f} {unit}")
    return ", ".join(parts)
