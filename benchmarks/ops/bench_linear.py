"""quant_linear against its floors: the bytes of the weight at the read bandwidth, the operations at the peak of the unit.

Example:

    python benchmarks/ops/bench_linear.py --rows 1,16,512 --sizes 2048x8192 --layouts int4_sym_g128_bf16 --computes int8
"""

from __future__ import annotations

import argparse
from functools import lru_cache, partial
from typing import Any

import torch
from harness import against_limits, copies, numbers, parser, report, seconds_per_call, sizes, start

from llmrt import ops
from llmrt.ops.formats import Layout

UNITS = {"int8": "int8", "bf16": "bf16", "fp16": "fp32", "fp32": "fp32"}


def weight(k: int, n: int, layout: Layout) -> torch.Tensor:
    """Return a random packed weight."""
    codes = torch.randint(256, (n, -(-k * layout.format.bits // 8)), dtype=torch.uint8)
    shape = (n, layout.geometry(k).groups)
    zeros = torch.full(shape, layout.format.zero, dtype=torch.uint8) if layout.asymmetric else None
    return ops.pack_weight(codes, torch.full(shape, 0.01, dtype=layout.scale_dtype), zeros, str(layout), k)


@lru_cache(maxsize=1)
def weights(k: int, n: int, layout: str) -> list[torch.Tensor]:
    """Return random packed weights, as many as make a cold cache; each packed, as a plain copy would lie on small pages."""
    first = weight(k, n, Layout.parse(layout))
    return [first, *(weight(k, n, Layout.parse(layout)) for _ in range(copies(first.numel()) - 1))]


@lru_cache(maxsize=1)
def dense_weights(k: int, n: int) -> list[torch.Tensor]:
    """Return random bfloat16 weights, as many as make a cold cache."""
    return [torch.randn(n, k, dtype=torch.bfloat16) for _ in range(copies(2 * n * k))]


def case(
    rows: int,
    k: int,
    n: int,
    layout: str,
    compute: str,
    dtype: torch.dtype,
    peaks: Any,
    seconds: float,
    against_torch: bool,
) -> dict[str, Any]:
    """Measure one case."""
    packed = weights(k, n, layout)
    x = torch.randn(rows, k).to(dtype)
    moved = packed[0].numel() + (x.numel() + rows * n) * x.element_size()
    name: dict[str, Any] = {"M": rows, "K": k, "N": n, "layout": layout, "compute": compute}
    calls = [partial(ops.quant_linear, x, one, None, None, layout, n, compute) for one in packed]
    ours = seconds_per_call(calls, seconds)
    name |= against_limits(ours, moved, 2.0 * rows * k * n, peaks, UNITS[compute])
    if against_torch:
        calls = [partial(torch.nn.functional.linear, x.bfloat16(), one) for one in dense_weights(k, n)]
        name["x torch bf16"] = seconds_per_call(calls, seconds) / ours
    return name


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
    options.add_argument("--torch", action="store_true", help="also measure torch's bfloat16 linear of the same size")
    return options.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure all cases."""
    args = parse(arguments)
    peaks, dtype = start(args)
    rows = [
        case(m, k, n, layout, compute, dtype, peaks, args.seconds, args.torch)
        for k, n in args.sizes
        for layout in args.layouts.split(",")
        for compute in args.computes.split(",")
        for m in args.rows
    ]
    report(rows, peaks, args)


if __name__ == "__main__":
    main()
