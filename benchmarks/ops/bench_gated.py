"""silu_mul and gelu_mul against the bytes that they move (small cases stay in a cache and pass 100 %)."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from harness import against_limits, copies, numbers, parser, run, seconds_per_call

from llmrt import ops


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    options = parser(__doc__)
    options.add_argument("--rows", type=numbers, default=[1, 16, 512], help="M, comma separated")
    options.add_argument("--sizes", type=numbers, default=[8192], help="intermediate sizes, comma separated")
    return options.parse_args(arguments)


def measure(args: argparse.Namespace, peaks: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Measure both on the strided halves of one tensor, as a fused gate/up projection gives them."""
    rows = []
    for width in args.sizes:
        for m in args.rows:
            moved = 3 * m * width * dtype.itemsize
            halves = [torch.randn(m, 2 * width).to(dtype).chunk(2, -1) for _ in range(copies(moved))]
            for name, operator, extra in (
                ("silu_mul", ops.silu_mul, ()),
                ("gelu_mul", ops.gelu_mul, ()),
                ("gelu_mul tanh", ops.gelu_mul, ("tanh",)),
            ):
                calls = [partial(operator, gate, up, *extra) for gate, up in halves]
                seconds = seconds_per_call(calls, args.seconds)
                rows.append({"op": name, "M": m, "width": width} | against_limits(seconds, moved, 0.0, peaks, "fp32"))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    run(parse, measure, arguments)


if __name__ == "__main__":
    main()
