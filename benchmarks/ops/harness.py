"""What the operator benchmarks share: timing over more data than the caches hold, limits, table and JSON."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where llmrt is not installed, the checkout serves

import torch

from llmrt.llm.measure import machine, machine_peaks

#: Bytes that a benchmark cycles through, well beyond a last-level cache.
COLD_BYTES = 256 << 20


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every operator benchmark."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    made.add_argument("--seconds", type=float, default=0.3, help="measured time per case")
    made.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="of activations")
    made.add_argument("--json", type=Path, help="write all figures to this file")
    return made


def numbers(text: str) -> list[int]:
    """Parse comma separated integers, for argparse."""
    return [int(part) for part in text.split(",")]


def sizes(text: str) -> list[tuple[int, int]]:
    """Parse comma separated KxN pairs, for argparse."""
    return [(int(k), int(n)) for k, n in (pair.split("x") for pair in text.split(","))]


def seconds_per_call(calls: Sequence[Callable[[], Any]], seconds: float) -> float:
    """Return the median time of one call; the calls take turns, so that none finds its data in a cache.

    Each must work on data of its own.
    """
    return alternate([calls], seconds)[0]


def alternate(contestants: Sequence[Sequence[Callable[[], Any]]], seconds: float) -> list[float]:
    """Return the median time of one call of each contestant; they take turns, so that what slows the machine slows all.

    Args:
        contestants: of each, calls that take turns too, each on data of its own, so that none finds its data in a cache.
        seconds: how long each is measured, at least; five calls are always made.
    """
    for calls in contestants:
        calls[0]()
    times: list[list[float]] = [[] for _ in contestants]
    end = time.perf_counter() + seconds * len(contestants)
    for number in itertools.count():
        for calls, mine in zip(contestants, times, strict=True):
            call = calls[number % len(calls)]
            start = time.perf_counter()
            call()
            mine.append(time.perf_counter() - start)
        if number >= 4 and time.perf_counter() > end:
            break
    return [statistics.median(mine) for mine in times]


def against_rivals(ours: float, rivals: dict[str, float | None]) -> dict[str, float | None]:
    """Return the columns of rivals: their time, and how many times as fast we are; None where one cannot run a case."""
    columns: dict[str, float | None] = {}
    for name, seconds in rivals.items():
        columns[f"{name} us"] = None if seconds is None else seconds * 1e6
        columns[f"x {name}"] = None if seconds is None else seconds / ours
    return columns


def copies(bytes_each: float) -> int:
    """Return how many sets of data make a cold cache."""
    return max(2, min(64, int(COLD_BYTES // max(bytes_each, 1)) + 1))


def against_limits(seconds: float, moved: float, ops: float, peaks: dict[str, Any], unit: str) -> dict[str, Any]:
    """Return one case's rates and its percentage of the limit that binds it.

    Args:
        seconds: of one call.
        moved: bytes that one call must read or write.
        ops: operations, two per multiply-accumulate.
        peaks: of `measure.machine_peaks`.
        unit: int8, bf16 or fp32.
    """
    floor_memory = moved / peaks["read"]
    floor_compute = ops / peaks[unit] if peaks[unit] else 0.0
    return {
        "us": seconds * 1e6,
        "GB/s": moved / seconds / 1e9,
        "Gop/s": ops / seconds / 1e9,
        "bound": "memory" if floor_memory >= floor_compute else unit,
        "percent": 100 * max(floor_memory, floor_compute) / seconds,
    }


def run(
    parse: Callable[[list[str] | None], argparse.Namespace],
    measure: Callable[..., list[dict[str, Any]]],
    arguments: Any,
) -> None:
    """Be the main function of an operator benchmark: parse the options, measure all cases, report them."""
    args = parse(arguments)
    peaks, dtype = start(args)
    report(measure(args, peaks, dtype), peaks, args)


def report(rows: list[dict[str, Any]], peaks: dict[str, Any], args: argparse.Namespace) -> None:
    """Print rows as a table and write them, with machine and limits, where ``--json`` says."""
    facts = machine()
    limits = ", ".join(
        f"{kind} {value / 1e9:.0f} {'GB/s' if kind == 'read' else 'Gop/s'}" for kind, value in peaks.items() if value
    )
    print(
        f"{facts['cpu']}, {facts['threads']} threads, tier {facts['isa']}, {args.dtype} activations; limits: {limits}"
    )
    print(format_table(rows))
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "peaks": peaks, "rows": rows}, indent=1) + "\n")


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return rows with equal keys as aligned text."""
    cells = [list(rows[0])] + [[_cell(name, value) for name, value in row.items()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        return format(value, ".2f" if name.startswith("x ") else ".1f")
    return "-" if value is None else str(value)


def start(args: argparse.Namespace) -> tuple[dict[str, Any], torch.dtype]:
    """Set the threads; return the machine's limits and the activation dtype."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return machine_peaks(), getattr(torch, args.dtype)
