"""The linears over floating-point weights beside torch's own: bytes against the read bandwidth, operations against the unit's peak.

"percent" is of whichever limit binds. Ours and torch's take turns, so that what slows the machine slows both.

Example:

    python benchmarks/ops/bench_dense.py --rows 1,4,16 --sizes 2048x8192 --dtype bfloat16
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from harness import against_limits, against_rivals, alternate, copies, numbers, parser, run, sizes
from torch.nn.functional import linear, silu

from llmrt import ops

UNITS = {torch.bfloat16: "bf16", torch.float16: "fp32", torch.float32: "fp32"}

#: Operator -> (ours, torch's) of x, a weight [N, K] and its two halves.
PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "dense_linear": (
        lambda x, whole, a, b: ops.dense_linear(x, whole, None, None),
        lambda x, whole, a, b: linear(x, whole),
    ),
    "parallel_linear": (
        lambda x, whole, a, b: ops.parallel_linear(x, [a, b], []),
        lambda x, whole, a, b: (linear(x, a), linear(x, b)),
    ),
    "gated_linear": (
        lambda x, whole, a, b: ops.gated_linear(x, a, b, None, None, "silu"),
        lambda x, whole, a, b: silu(linear(x, a)) * linear(x, b),
    ),
}


@lru_cache(maxsize=1)
def weights(k: int, n: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Return copies of a random weight, each with its halves, more than a cache holds."""
    drawn = torch.empty(n, k, dtype=dtype).normal_()
    return [(one, *one.chunk(2)) for one in (drawn.clone() for _ in range(copies(n * k * dtype.itemsize)))]


def case(name: str, m: int, k: int, n: int, dtype: torch.dtype, peaks: Any, seconds: float) -> dict[str, Any]:
    """Measure one operator against torch."""
    size = n * k * dtype.itemsize
    x = torch.randn(m, k).to(dtype)
    parts = weights(k, n, dtype)
    ours, theirs = alternate([[partial(call, x, *part) for part in parts] for call in PAIRS[name]], seconds)
    moved = size + (m * k + m * n) * dtype.itemsize
    row = {"op": name, "M": m, "K": k, "N": n} | against_limits(ours, moved, 2.0 * m * k * n, peaks, UNITS[dtype])
    return row | against_rivals(ours, {"torch": theirs})


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    options = parser(__doc__)
    options.add_argument("--rows", type=numbers, default=[1, 2, 4, 8, 16, 128, 512], help="M, comma separated")
    options.add_argument("--sizes", type=sizes, default=[(2048, 8192), (8192, 2048)], help="KxN, comma separated")
    options.add_argument("--operators", default=",".join(PAIRS), help="comma separated")
    return options.parse_args(arguments)


def measure(args: argparse.Namespace, peaks: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Measure all cases."""
    return [
        case(name, m, k, n, dtype, peaks, args.seconds)
        for k, n in args.sizes
        for name in args.operators.split(",")
        for m in args.rows
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    run(parse, measure, arguments)


if __name__ == "__main__":
    main()
