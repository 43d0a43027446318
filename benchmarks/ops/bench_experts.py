"""quant_experts against its floors: the bytes of the experts that tokens chose, the operations of their products.

Example:

    python benchmarks/ops/bench_experts.py --rows 1,512 --sizes 2048x1024 --experts 64 --chosen 8
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from harness import against_limits, copies, numbers, parser, run, seconds_per_call, sizes

from llmrt import ops
from llmrt.ops.formats import Layout


def packed_experts(count: int, rows: int, k: int, layout: str) -> torch.Tensor:
    """Return the weights of all experts, uint8 [E, ...]; each is the same."""
    form = Layout.parse(layout)
    codes = torch.randint(256, (rows, -(-k * form.format.bits // 8)), dtype=torch.uint8)
    if form.format.dtype is not None:
        codes &= 0xBF  # floats: without the highest bit of the exponent none is NaN or infinite
    shape = (rows, form.geometry(k).groups)
    zeros = torch.full(shape, form.format.zero, dtype=torch.uint8) if form.asymmetric else None
    packed = ops.pack_weight(codes, torch.full(shape, 0.01, dtype=form.scale_dtype), zeros, layout, k)
    return packed.repeat(count, *(1 for _ in packed.shape))


def case(m: int, hidden: int, width: int, args: argparse.Namespace, peaks: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Measure one number of tokens, each call with other experts."""
    up = packed_experts(args.experts, 2 * width, hidden, args.layout)
    down = packed_experts(args.experts, hidden, width, args.layout)
    x, scores = torch.randn(m, hidden).to(dtype), torch.rand(m, args.chosen)
    expert_bytes = up[0].numel() + down[0].numel()
    choices = [torch.rand(m, args.experts).topk(args.chosen).indices for _ in range(copies(args.chosen * expert_bytes))]
    hit = sum(len(choice.unique()) for choice in choices) / len(choices)
    settings = (None, None, args.layout, args.layout, width, args.compute, args.compute)
    calls = [partial(ops.quant_experts, x, choice, scores, up, down, *settings) for choice in choices]
    moved, operations = hit * expert_bytes + 2 * x.nbytes, 6.0 * m * args.chosen * hidden * width
    row = {"M": m, "H": hidden, "I": width, "experts": f"{args.chosen}/{args.experts}", "layout": args.layout}
    unit = {"fp16": "fp32"}.get(args.compute, args.compute)
    return row | against_limits(seconds_per_call(calls, args.seconds), moved, operations, peaks, unit)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    options = parser(__doc__)
    options.add_argument("--rows", type=numbers, default=[1, 4, 16, 128, 512], help="M, comma separated")
    options.add_argument("--sizes", type=sizes, default=[(2048, 1024)], help="HxI, comma separated")
    options.add_argument("--experts", type=int, default=64, help="E")
    options.add_argument("--chosen", type=int, default=8, help="experts of a token")
    options.add_argument("--layout", default="int4_sym_g128_bf16", help="of all weights")
    options.add_argument("--compute", default="int8", help="of the products")
    return options.parse_args(arguments)


def measure(args: argparse.Namespace, peaks: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Measure all cases."""
    return [case(m, hidden, width, args, peaks, dtype) for hidden, width in args.sizes for m in args.rows]


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    run(parse, measure, arguments)


if __name__ == "__main__":
    main()
