"""Whole models on one device, in turn: llmrt's in several formats beside transformers in bfloat16, both through `generate`.

    python benchmarks/device.py --device cuda --shape llama-3.1-8b -p 512 -n 128
    python benchmarks/device.py --device cuda --ours int4,int8 --batch 16
    python benchmarks/device.py --device cpu --shape llama-3.2-1b

All models are on the device at once and take turns, round after round. Rates are medians; a ratio is the median of the rounds' own
ratios. Decode's bytes are the weights that one token reads. benchmarks/README.md has the rules.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where llmrt is not installed, the checkout serves

import torch

from llmrt import devices
from llmrt.llm import bench, doctor, measure
from llmrt.llm.families.shapes import shape_config, shape_names
from llmrt.llm.timing import synchronize
from llmrt.ops.formats import FORMATS

RIVAL = "transformers bf16"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options; the device is there and the workload fits the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, xpu, cuda:1 ... or cpu")
    parser.add_argument("--shape", default="llama-3.2-1b", help=f"one of {', '.join(shape_names())}")
    parser.add_argument("--ours", default="int4,int8,bf16", help=f"comma separated: bf16 or {', '.join(FORMATS)}")
    parser.add_argument("--group-size", type=int, default=128, help="inputs that share a scale; -1: whole rows")
    for short, name, default, text in (
        ("-p", "prompt", 512, "prompt tokens"),
        ("-n", "new", 128, "new tokens"),
        ("-d", "depth", 0, "tokens in the cache before the prompt"),
        ("-b", "batch", 1, "sequences"),
        ("-k", "beams", 1, "beams per sequence; 1 is greedy"),
    ):
        parser.add_argument(short, f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one for warm-up and compilation")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args(arguments)
    args.ours = args.ours.split(",")
    if unknown := [name for name in args.ours if name not in (*FORMATS, "bf16")]:
        parser.error(f"--ours has {', '.join(unknown)}; valid: bf16, {', '.join(FORMATS)}")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; valid: at least 1")
    try:
        devices.check(args.device)
        args.workload = measure.Workload(args.prompt, args.new, args.depth, args.batch, args.beams)
        args.workload.check_length(shape_config(args.shape))
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    return args


def settings(name: str, group_size: int) -> bench.Settings:
    """Return how a contestant's model is made; its activations and cache are bfloat16."""
    if name in (RIVAL, "bf16"):
        return bench.Settings(weight_dtype="none", optimize=name != RIVAL)
    computes = FORMATS[name].computes
    return bench.Settings(
        weight_dtype=name, group_size=group_size, compute_dtype="auto" if "int8" in computes else "bf16"
    )


def copy_rate(device: str) -> float:
    """Return the bytes per second that a copy of 256 MB reads and writes."""
    data, times = torch.zeros(1 << 28, dtype=torch.uint8, device=device), []
    into = torch.zeros_like(data)
    for _ in range(8):
        synchronize(data.device)
        start = time.perf_counter()
        into.copy_(data)
        synchronize(data.device)
        times.append(time.perf_counter() - start)
    return 2 * data.numel() / statistics.median(times)


def device_name(device: str) -> str:
    """Return what the machine calls the device."""
    kind = torch.device(device)
    return doctor.cpu_name() if kind.type == "cpu" else torch.get_device_module(kind).get_device_name(kind)


def references(device: str) -> list[str]:
    """Return which operators ran their slow references on the device so far, and why."""
    if torch.device(device).type == "cpu":
        return []
    return sorted({f"{found.operator}: {found.reason}" for found in devices.xpu_room().fallbacks()})


def contestants(args: argparse.Namespace) -> tuple[dict[str, measure.Stopwatch], dict[str, int]]:
    """Build all models; return what runs each, and the bytes of the weights that a token reads."""
    runs, weights = {}, {}
    for name in (RIVAL, *args.ours):
        start, made = time.perf_counter(), settings(name, args.group_size)
        model = bench.build(shape_config(args.shape), made, args.device)
        runs[name] = measure.Stopwatch(model, args.workload)
        weights[name] = measure.count_work(model, torch.bfloat16).weight_bytes
        print(f"{name}: built in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return runs, weights


def alternate(runs: dict[str, measure.Stopwatch], rounds: int) -> dict[str, list[measure.Timing]]:
    """Return the timings of every round; one more comes before them, and the order rotates."""
    timings: dict[str, list[measure.Timing]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            timing = runs[name].run()
            if number:
                timings[name].append(timing)
    return timings


def ratio(ours: list[dict[str, Any]], rival: list[dict[str, Any]], key: str) -> float:
    """Return the median over rounds of our rate in units of the rival's."""
    return statistics.median(mine[key] / other[key] for mine, other in zip(ours, rival, strict=True))


def rows(
    timings: dict[str, list[measure.Timing]], weights: dict[str, int], load: measure.Workload, rate: float
) -> list[dict[str, Any]]:
    """Return one line per contestant."""
    single = {name: [measure.summarize([one], load) for one in found] for name, found in timings.items()}
    found = []
    for name, mine in timings.items():
        result = measure.summarize(mine, load)
        read = weights[name] * result["decode_tokens_per_s"] / load.batch
        found.append(
            {
                "model": name if name == RIVAL else f"llmrt {name}",
                "first ms": result["first_token_ms"],
                "prefill tok/s": result["prefill_tokens_per_s"],
                "x prefill": ratio(single[name], single[RIVAL], "prefill_tokens_per_s"),
                "decode tok/s": result["decode_tokens_per_s"],
                "x decode": ratio(single[name], single[RIVAL], "decode_tokens_per_s"),
                "weights GB": weights[name] / 1e9,
                "GB/s": read / 1e9,
                "% of a copy": 100 * read / rate,
            }
        )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Return lines with equal keys as aligned text."""
    cells = [list(found[0])] + [
        [value if isinstance(value, str) else f"{value:.2f}" for value in row.values()] for row in found
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    args = parse(arguments)
    name, rate = device_name(args.device), copy_rate(args.device)
    runs, weights = contestants(args)
    timings = alternate(runs, args.rounds)
    found = rows(timings, weights, args.workload, rate)
    load = args.workload
    print(f"{name}, PyTorch {torch.__version__}: a copy moves {rate / 1e9:.0f} GB/s")
    print(
        f"{args.shape}: prompt {load.prompt}, new {load.new}, depth {load.depth}, batch {load.batch}, beams {load.beams}"
    )
    print(table(found))
    slow = references(args.device)
    for line in slow:
        print(f"ran as a slow reference: {line}")
    if args.json:
        record = {
            "device": name,
            "bytes_per_second": rate,
            "versions": doctor.versions(),
            "shape": args.shape,
            "workload": measure.workload_fields(load),
            "rows": found,
            "references": slow,
            "rounds": {key: measure.summarize(mine, load)["iterations"] for key, mine in timings.items()},
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
