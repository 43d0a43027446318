"""quant_linear against its floors: the bytes of the weight at the read bandwidth, the operations at the peak of the unit.

Example:

    python benchmarks/ops/bench_linear.py --rows 1,16,512 --sizes 2048x8192 --layouts int4_sym_g128_bf16 --computes int8
    python benchmarks/ops/bench_linear.py --rivals bf16,int4pack
    python benchmarks/ops/bench_linear.py --rivals bf16 --layouts nf4_sym_g64_bf16,fp8_e4m3_sym_channel_f32
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from harness import against_limits, against_rivals, alternate, copies, numbers, parser, run, sizes
from torch.nn.functional import linear

from llmrt import ops
from llmrt.ops.formats import Layout

UNITS = {"int8": "int8", "bf16": "bf16", "fp16": "fp32", "fp32": "fp32"}


@lru_cache(maxsize=1)
def packed_weights(k: int, n: int, layout: str) -> list[torch.Tensor]:
    """Return a random packed weight several times, more than a cache holds."""
    form = Layout.parse(layout)
    codes = torch.randint(256, (n, -(-k * form.format.bits // 8)), dtype=torch.uint8)
    if form.format.dtype is not None:
        codes &= 0xBF  # floats: without the highest bit of the exponent none is NaN or infinite
    shape = (n, form.geometry(k).groups)
    zeros = torch.full(shape, form.format.zero, dtype=torch.uint8) if form.asymmetric else None
    scales = torch.full(shape, 0.01, dtype=form.scale_dtype)
    first = ops.pack_weight(codes, scales, zeros, layout, k)
    more = range(copies(first.numel()) - 1)  # packed, too: a plain copy would not lie on large pages
    return [first, *(ops.pack_weight(codes, scales, zeros, layout, k) for _ in more)]


@lru_cache(maxsize=1)
def bf16_weights(k: int, n: int) -> list[torch.Tensor]:
    """Return copies of a random weight for torch's linear."""
    drawn = torch.empty(n, k, dtype=torch.bfloat16).normal_()
    return [drawn, *(drawn.clone() for _ in range(copies(2 * n * k) - 1))]


@lru_cache(maxsize=1)
def int4pack_weights(k: int, n: int) -> list[torch.Tensor]:
    """Return random weights in the form of `torch._weight_int4pack_mm_for_cpu`: whatever the order, codes are some weight."""
    return [torch.randint(256, (n, k // 2), dtype=torch.uint8) for _ in range(copies(n * k / 2))]


def rival(name: str, rows: int, k: int, n: int, layout: Layout) -> list[Callable[[], Any]] | None:
    """Return the calls of what torch has for a shape; None if it cannot run it.

    bf16: its linear. int4pack: `torch._weight_int4pack_mm_for_cpu`, of INT4 in groups, outputs in 16s.
    """
    x = torch.randn(rows, k, dtype=torch.bfloat16)
    if name == "bf16":
        return [partial(linear, x, weight) for weight in bf16_weights(k, n)]
    group = layout.group_size
    if layout.format.bits != 4 or group not in (32, 64, 128) or n % 16 or k % group:
        return None
    scales = torch.full((k // group, n, 2), 0.01, dtype=torch.bfloat16)
    return [partial(torch._weight_int4pack_mm_for_cpu, x, weight, group, scales) for weight in int4pack_weights(k, n)]


def case(
    rows: int, k: int, n: int, layout: str, compute: str, dtype: torch.dtype, peaks: Any, args: Any
) -> dict[str, Any]:
    """Measure one case, in turn with torch's own."""
    weights = packed_weights(k, n, layout)
    x = torch.randn(rows, k).to(dtype)
    moved = weights[0].numel() + (x.numel() + rows * n) * x.element_size()
    calls = [partial(ops.quant_linear, x, packed, None, None, layout, n, compute) for packed in weights]
    rivals = {name: rival(name, rows, k, n, Layout.parse(layout)) for name in args.rivals.split(",") if name}
    running = {name: theirs for name, theirs in rivals.items() if theirs is not None}
    ours, *theirs = alternate([calls, *running.values()], args.seconds)
    times = dict.fromkeys(rivals) | dict(zip(running, theirs, strict=True))
    row = {"M": rows, "K": k, "N": n, "layout": layout, "compute": compute}
    return row | against_limits(ours, moved, 2.0 * rows * k * n, peaks, UNITS[compute]) | against_rivals(ours, times)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    options = parser(__doc__)
    options.add_argument("--rows", type=numbers, default=[1, 2, 4, 8, 16, 32, 128, 512], help="M, comma separated")
    options.add_argument(
        "--sizes", type=sizes, default=[(2048, 3072), (2048, 16384), (8192, 2048)], help="KxN, comma separated"
    )
    options.add_argument(
        "--layouts", default="int4_sym_g128_bf16,int4_sym_g32_bf16,int8_sym_channel_f32", help="comma separated"
    )
    options.add_argument("--computes", default="int8,bf16", help="comma separated")
    options.add_argument("--rivals", default="", help="torch's own, in turn with ours; comma separated: bf16, int4pack")
    return options.parse_args(arguments)


def measure(args: argparse.Namespace, peaks: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Measure all cases."""
    return [
        case(m, k, n, layout, compute, dtype, peaks, args)
        for k, n in args.sizes
        for layout in args.layouts.split(",")
        for compute in args.computes.split(",")
        if compute in Layout.parse(layout).format.computes
        for m in args.rows
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    run(parse, measure, arguments)


if __name__ == "__main__":
    main()
