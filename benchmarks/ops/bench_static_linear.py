"""static_linear (8-bit weights and activations) against its floors, in turn with quant_linear in INT8 and with torch's linear.

Example:

    python benchmarks/ops/bench_static_linear.py --rows 1,16,512 --sizes 2048x8192
    python benchmarks/ops/bench_static_linear.py --rivals quant_linear,bf16 --factors
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from bench_linear import bf16_weights
from harness import against_limits, against_rivals, alternate, copies, numbers, parser, run, sizes
from torch.nn.functional import linear

from llmrt import ops

LAYOUT = "int8_sym_channel_f32"


@lru_cache(maxsize=1)
def packed_weights(k: int, n: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return a random packed weight several times, more than a cache holds, and the sums of its codes."""
    codes = torch.randint(1, 256, (n, k), dtype=torch.uint8)
    scales = torch.full((n, 1), 0.01)
    count = copies(n * k)
    return [ops.pack_weight(codes, scales, None, LAYOUT, k) for _ in range(count)], ops.weight_sums(codes)


def rival(name: str, x: torch.Tensor, k: int, n: int) -> list[Callable[[], Any]]:
    """Return the calls of another product of the same sizes: quant_linear, on the same weights, or bf16, torch's linear."""
    if name == "bf16":
        return [partial(linear, x.bfloat16(), weight) for weight in bf16_weights(k, n)]
    weights, _ = packed_weights(k, n)
    return [partial(ops.quant_linear, x, packed, None, None, LAYOUT, n, "int8") for packed in weights]


def case(rows: int, k: int, n: int, dtype: torch.dtype, peaks: Any, args: Any) -> dict[str, Any]:
    """Measure one case, in turn with its rivals."""
    weights, sums = packed_weights(k, n)
    x = torch.randn(rows, k).to(dtype)
    factors = torch.rand(k) + 0.5 if args.factors else None
    moved = weights[0].numel() + (x.numel() + rows * n) * x.element_size()
    settings = (sums, None, None, factors, 0.03, 128, LAYOUT, n)
    calls = [partial(ops.static_linear, x, packed, *settings) for packed in weights]
    rivals = [name for name in args.rivals.split(",") if name]
    ours, *theirs = alternate([calls, *(rival(name, x, k, n) for name in rivals)], args.seconds)
    row = {"M": rows, "K": k, "N": n, "layout": LAYOUT, "compute": "factors" if args.factors else "static"}
    limits = against_limits(ours, moved, 2.0 * rows * k * n, peaks, "int8")
    return row | limits | against_rivals(ours, dict(zip(rivals, theirs, strict=True)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    options = parser(__doc__)
    add = options.add_argument
    add("--rows", type=numbers, default=[1, 2, 4, 8, 16, 32, 128, 512], help="M, comma separated")
    add("--sizes", type=sizes, default=[(2048, 3072), (2048, 16384), (8192, 2048)], help="KxN, comma separated")
    add("--factors", action="store_true", help="inputs are multiplied by smoothing factors first")
    add("--rivals", default="", help="in turn with ours; comma separated: quant_linear, bf16")
    return options.parse_args(arguments)


def measure(args: argparse.Namespace, peaks: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Measure all cases."""
    return [case(m, k, n, dtype, peaks, args) for k, n in args.sizes for m in args.rows]


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    run(parse, measure, arguments)


if __name__ == "__main__":
    main()
