"""Measures every operator against its floors, in the sizes of a model, and its linears in turn with torch's own.

The floor of a case is the larger of its bytes at the read bandwidth and its operations at the peak of the unit. The programs of
benchmarks/ops do the measuring and can be used alone.

    python benchmarks/operators.py --shape llama-3.2-1b
    python benchmarks/operators.py --shape qwen3-0.6b --only linear,attention --quick

Writes operators-SHAPE.json, .txt and .png to benchmarks/results. benchmarks/README.md has the rules.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE / "ops")]  # where llmrt is not installed, the checkout serves

import torch  # noqa: E402
from operators_report import extremes, plot, table  # noqa: E402

from llmrt.llm import measure  # noqa: E402
from llmrt.llm.families.shapes import SHAPES, shape_config, shape_names  # noqa: E402

ROWS = (1, 2, 4, 8, 16, 32, 128, 512, 2048)
QUICK_ROWS = (1, 16, 512)
#: The head runs on the last token of a sequence: never on more rows than there are sequences or drafted tokens.
HEAD_ROWS = 16
KEY_LENGTHS = (512, 2048, 8192, 32768)
QUICK_KEY_LENGTHS = (512, 8192)
PROGRAMS = ("linear", "static_linear", "dense", "attention", "norm", "gated", "rope", "kv_append")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", default="llama-3.2-1b", choices=tuple(SHAPES), metavar="SHAPE", help=", ".join(shape_names()))
    add("--only", default=",".join(PROGRAMS), help=f"comma separated, from {', '.join(PROGRAMS)}")
    add("--layouts", default="int4_sym_g128_bf16,int8_sym_channel_f32", help="of quant_linear, comma separated")
    add("--computes", default="int8,bf16", help="of quant_linear, comma separated")
    add("--seconds", type=float, default=0.2, help="measured time per case and contestant")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    add("--quick", action="store_true", help="few sizes, little time: to see that all works")
    add("--name", help="the results are NAME.json, ...; default: operators-SHAPE")
    add("--out", type=Path, default=HERE / "results", help="folder for the results")
    args = parser.parse_args(arguments)
    args.only = args.only.split(",")
    if unknown := [name for name in args.only if name not in PROGRAMS]:
        parser.error(f"--only: unknown {', '.join(unknown)}; valid: {', '.join(PROGRAMS)}")
    cpus = len(os.sched_getaffinity(0))
    if not 1 <= args.threads <= cpus:
        parser.error(f"--threads is {args.threads}; valid: 1 to {cpus}, the CPUs of this process")
    return args


def linear_sizes(shape: str) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Return ((K, N) of a layer's linears: q, k and v together, output, gate and up together, down; (K, N) of the head)."""
    config = shape_config(shape)
    hidden, inner, (queries, keys, dim) = config.hidden_size, config.intermediate_size, heads(shape)
    layer = [
        (hidden, (queries + 2 * keys) * dim),
        (queries * dim, hidden),
        (hidden, 2 * inner),
        (inner, hidden),
    ]
    return list(dict.fromkeys(layer)), (hidden, config.vocab_size)


def heads(shape: str) -> tuple[int, int, int]:
    """Return query heads, key/value heads and head dimension."""
    config = shape_config(shape)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads, config.num_key_value_heads, dim


def plan(args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Yield (program, its options) of every measurement."""
    rows, lengths = (QUICK_ROWS, QUICK_KEY_LENGTHS) if args.quick else (ROWS, KEY_LENGTHS)
    few = [m for m in rows if m <= HEAD_ROWS]
    layer, head = linear_sizes(args.shape)
    config, (h, hk, d) = shape_config(args.shape), heads(args.shape)
    weights = [f"--layouts={args.layouts}", f"--computes={args.computes}", "--rivals=bf16,int4pack"]
    cases = [(s, t) for s in (1, 8, 512) for t in lengths if s <= t]
    for name, options in (
        ("linear", [f"--rows={_list(rows)}", f"--sizes={_pairs(layer)}", *weights]),
        ("linear", [f"--rows={_list(few)}", f"--sizes={_pairs([head])}", *weights]),
        ("static_linear", [f"--rows={_list(rows)}", f"--sizes={_pairs(layer)}", "--rivals=quant_linear,bf16"]),
        ("dense", [f"--rows={_list(rows)}", f"--sizes={_pairs(layer)}", "--operators=dense_linear"]),
        (
            "dense",
            [f"--rows={_list(rows)}", f"--sizes={_pairs(layer[:1])}", "--operators=parallel_linear,gated_linear"],
        ),
        ("dense", [f"--rows={_list(few)}", f"--sizes={_pairs([head])}", "--operators=dense_linear"]),
        ("attention", [f"--cases={_pairs(cases)}", f"--heads={h}x{hk}x{d}", "--rivals"]),
        ("norm", [f"--rows={_list(rows)}", f"--sizes={config.hidden_size}"]),
        ("gated", [f"--rows={_list(rows)}", f"--sizes={config.intermediate_size}"]),
        ("rope", [f"--tokens={_list(rows)}", f"--heads={h}x{hk}x{d}"]),
        ("kv_append", [f"--tokens={_list(rows)}", f"--heads={hk}x{d}"]),
    ):
        if name in args.only:
            yield name, [*options, f"--seconds={0.02 if args.quick else args.seconds}", f"--threads={args.threads}"]


def _list(values: Any) -> str:
    return ",".join(map(str, values))


def _pairs(values: Any) -> str:
    return ",".join(f"{a}x{b}" for a, b in values)


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """Run all programs; the machine's limits are measured again before each, and every row is against those before it."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows: dict[str, list[dict[str, Any]]] = {}
    limits = []
    for name, options in plan(args):
        program = importlib.import_module(f"bench_{name}")
        peaks = measure.machine_peaks()
        limits.append(peaks)
        rows.setdefault(name, []).extend(program.measure(program.parse(options), peaks, torch.bfloat16))
        print(f"measured {name} {' '.join(options)}", flush=True)
    return {"shape": args.shape, "machine": measure.machine(), "peaks": limits, "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    """Measure everything and write the results."""
    args = parse(arguments)
    record = collect(args)
    text = table(record)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / (args.name or f"operators-{args.shape}")
    record["extremes"] = extremes(record["rows"])
    stem.with_name(stem.name + ".json").write_text(json.dumps(record, indent=1) + "\n")
    stem.with_name(stem.name + ".txt").write_text(text + "\n")
    plot(record, stem.with_name(stem.name + ".png"))
    print(text)
    print(f"written to {stem}.json, .txt, .png")


if __name__ == "__main__":
    main()
