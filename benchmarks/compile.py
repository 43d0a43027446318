"""Compares compile backends on an untouched bfloat16 model: the first call, and the rates of prompt and decode after it.

Every backend runs in a process of its own, with empty inductor caches; all stay loaded and take turns, round after round.

    python benchmarks/compile.py --shape llama-3.2-1b -p 512 -n 64
    python benchmarks/compile.py --layers 4 --cache static --rounds 3

Writes compile-SHAPE.json, .txt and .png to benchmarks/results. benchmarks/README.md has the rules.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # where llmrt is not installed, the checkout with an extension built in place serves

from fleet import Worker  # noqa: E402

from llmrt.llm import measure  # noqa: E402
from llmrt.llm.families.shapes import SHAPES, shape_names  # noqa: E402

BACKENDS = ("eager", "inductor", "llmrt-eager", "llmrt-inductor")
BASE = "inductor"  # the backend that ratios compare with


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", default="llama-3.2-1b", choices=tuple(SHAPES), metavar="SHAPE", help=", ".join(shape_names()))
    add("--layers", type=int, default=0, help="decoder layers; 0: as many as the shape has")
    add("--backends", default=",".join(BACKENDS), help=f"comma separated, from {', '.join(BACKENDS)}; {BASE} is needed")
    add("--cache", default="static", choices=("static", "dynamic"), help="transformers' cache_implementation")
    add("-p", "--prompt", type=int, default=512, help="prompt tokens")
    add("-n", "--new", type=int, default=64, help="new tokens")
    add("--rounds", type=int, default=5, help="measured rounds (medians are reported), after one for warm-up")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every backend, one per CPU")
    add("--pause", type=float, default=0.5, help="seconds between two runs, until the last one's threads sleep")
    add("--out", type=Path, default=HERE / "results", help="folder for the results")
    args = parser.parse_args(arguments)
    args.backends = args.backends.split(",")
    if unknown := [b for b in args.backends if b not in BACKENDS]:
        parser.error(f"--backends: unknown {', '.join(unknown)}; valid: {', '.join(BACKENDS)}")
    if BASE not in args.backends:
        parser.error(f"--backends: {BASE} is missing; ratios compare with it")
    for name, least in (("layers", 0), ("prompt", 1), ("new", 2), ("rounds", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; valid: at least {least}")
    cpus = len(os.sched_getaffinity(0))
    if not 1 <= args.threads <= cpus:
        parser.error(f"--threads is {args.threads}; valid: 1 to {cpus}, the CPUs of this process")
    return args


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Load all backends, measure them in turn and return everything that was seen."""
    cpus = sorted(os.sched_getaffinity(0))[: args.threads]
    options = [f"--{name}={getattr(args, name)}" for name in ("shape", "cache", "layers", "prompt", "new", "threads")]
    script = str(HERE / "workers" / "compiled_model.py")
    workers: dict[str, Worker] = {}
    rounds: dict[str, list[dict[str, float]]] = {backend: [] for backend in args.backends}
    try:
        for backend in args.backends:
            print(f"loading and compiling: {backend}", flush=True)
            workers[backend] = Worker([sys.executable, script, backend, *options], cpus)
        for number in range(args.rounds + 1):
            turn = number % len(args.backends)
            for backend in args.backends[turn:] + args.backends[:turn]:
                time.sleep(args.pause)
                result = workers[backend].run()
                if number:  # round 0 warms up
                    rounds[backend].append(result)
            print(f"round {number} of {args.rounds}", flush=True)
    finally:
        for worker in workers.values():
            worker.stop()
    return {
        "shape": args.shape,
        "cache": args.cache,
        "prompt": args.prompt,
        "new": args.new,
        "machine": {**measure.machine(), "threads": args.threads},
        "options": {key: str(value) for key, value in vars(args).items()},
        "backends": {b: {"facts": workers[b].facts, "rounds": rounds[b]} for b in args.backends},
    }


def summarize(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per backend.

    Rates are medians over rounds; a ratio (above 1: this backend is faster than inductor) is the median of the rounds' own
    ratios. The compile time is that of the first call less the median of a later one, which does the same work.
    """

    def whole(one: dict[str, float]) -> float:
        return one["first_token_s"] + one["decode_s"]

    compiling = {
        name: seen["facts"]["first_call_s"] - median(map(whole, seen["rounds"]))
        for name, seen in record["backends"].items()
    }
    base = record["backends"][BASE]["rounds"]
    rows = []
    for name, seen in record["backends"].items():
        pairs = list(zip(base, seen["rounds"], strict=True))
        rows.append(
            {
                "backend": name,
                "first_call_s": seen["facts"]["first_call_s"],
                "compile_s": compiling[name],
                "compile_ratio": compiling[name] / compiling[BASE],
                "graphs": seen["facts"]["graphs"],
                "prefill_tokens_per_s": median(record["prompt"] / r["first_token_s"] for r in seen["rounds"]),
                "prefill_ratio": median(b["first_token_s"] / r["first_token_s"] for b, r in pairs),
                "decode_tokens_per_s": median((record["new"] - 1) / r["decode_s"] for r in seen["rounds"]),
                "decode_ratio": median(b["decode_s"] / r["decode_s"] for b, r in pairs),
                "peak_memory_megabytes": seen["facts"]["peak_memory_bytes"] / 1e6,
            }
        )
    return rows


COLUMNS = (  # field, heading, format
    ("backend", "backend", "s"),
    ("first_call_s", "first call s", ".1f"),
    ("compile_s", "compile s", ".1f"),
    ("compile_ratio", "x", ".2f"),
    ("graphs", "graphs", "d"),
    ("prefill_tokens_per_s", "prefill tok/s", ".1f"),
    ("prefill_ratio", "x", ".2f"),
    ("decode_tokens_per_s", "decode tok/s", ".2f"),
    ("decode_ratio", "x", ".2f"),
    ("peak_memory_megabytes", "peak MB", ".0f"),
)


def table(record: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, under lines that say where and how they were measured."""
    machine, facts = record["machine"], record["backends"][BASE]["facts"]
    rounds = len(record["backends"][BASE]["rounds"])
    lines = [
        f"{record['shape']}, {facts['layers']} layers, bfloat16, random weights, untouched transformers model; {record['cache']} "
        f"cache, prompt {record['prompt']}, new {record['new']}; medians of {rounds} alternating rounds",
        f"{machine['cpu']}, {machine['threads']} threads, tier {machine['isa']}, {facts['version']}; cold inductor caches",
        f"x: against {BASE} (compile: below 1 is faster; tok/s: above 1 is faster)",
        "",
        "| " + " | ".join(heading for _, heading, _ in COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(format(row[field], form) for field, _, form in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def plot(record: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Draw compile time and both rates as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 0.6 * len(rows) + 1.6), constrained_layout=True)
    names = [row["backend"] for row in rows]
    colors = ["tab:blue" if name.startswith("llmrt") else "tab:gray" for name in names]
    for axis, field, label in (
        (axes[0], "compile_s", "compile, s"),
        (axes[1], "prefill_tokens_per_s", "prefill, tokens per second"),
        (axes[2], "decode_tokens_per_s", "decode, tokens per second"),
    ):
        values = [row[field] for row in rows]
        axis.bar_label(axis.barh(names, values, color=colors), fmt="%.1f", padding=3, fontsize=8)
        axis.set_xlim(0, 1.3 * max(values))
        axis.set_xlabel(label)
        axis.invert_yaxis()
    machine = record["machine"]
    figure.suptitle(
        f"{record['shape']}, {record['cache']} cache, {machine['cpu']}, {machine['threads']} threads", fontsize=10
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison and write its results."""
    args = parse(arguments)
    record = compare(args)
    rows = summarize(record)
    text = table(record, rows)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"compile-{args.shape}"
    stem.with_name(stem.name + ".json").write_text(json.dumps({**record, "summary": rows}, indent=1) + "\n")
    stem.with_name(stem.name + ".txt").write_text(text + "\n")
    plot(record, rows, stem.with_name(stem.name + ".png"))
    print(text)
    print(f"written to {stem}.json, .txt, .png")


if __name__ == "__main__":
    main()
