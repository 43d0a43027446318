"""The linears over floating-point weights beside torch's own: bytes against the read bandwidth, operations against the unit's peak.

"percent" is of whichever limit binds. Ours and torch's take turns, so that what slows the machine slows both.

Example:

    python benchmarks/ops/bench_dense.py --rows 1,4,16 --sizes 2048x8192 --dtype bfloat16
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import against_limits, copies, numbers, parser, report, sizes, start
from torch import Tensor
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


def medians(pair: tuple[Callable[..., Any], ...], x: Tensor, weights: list[Tensor], seconds: float) -> list[float]:
    """Return the median time of each of `pair`, called in turn over the weights, of which no cache holds the next."""
    parts = [(weight, *weight.chunk(2)) for weight in weights]
    times: list[list[float]] = [[] for _ in pair]
    for call in pair:
        call(x, *parts[0])
    end = time.perf_counter() + seconds * len(pair)
    turns = itertools.cycle(parts)
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, mine in zip(pair, times, strict=True):
            part = next(turns)
            begin = time.perf_counter()
            call(x, *part)
            mine.append(time.perf_counter() - begin)
    return [statistics.median(mine) for mine in times]


def case(name: str, m: int, k: int, n: int, dtype: torch.dtype, peaks: Any, seconds: float) -> dict[str, Any]:
    """Measure one operator against torch."""
    size = n * k * dtype.itemsize
    weights = [torch.randn(n, k).to(dtype) for _ in range(copies(size))]
    ours, theirs = medians(PAIRS[name], torch.randn(m, k).to(dtype), weights, seconds)
    moved = size + (m * k + m * n) * dtype.itemsize
    row = {"op": name, "M": m, "K": k, "N": n} | against_limits(ours, moved, 2.0 * m * k * n, peaks, UNITS[dtype])
    return row | {"torch us": theirs * 1e6, "torch GB/s": moved / theirs / 1e9, "times torch": theirs / ours}


def main(arguments: list[str] | None = None) -> None:
    """Measure all cases."""
    options = parser(__doc__)
    options.add_argument("--rows", type=numbers, default=[1, 2, 4, 8, 16, 128, 512], help="M, comma separated")
    options.add_argument("--sizes", type=sizes, default=[(2048, 8192), (8192, 2048)], help="KxN, comma separated")
    options.add_argument("--operators", default=",".join(PAIRS), help="comma separated")
    args = options.parse_args(arguments)
    peaks, dtype = start(args)
    rows = [
        case(name, m, k, n, dtype, peaks, args.seconds)
        for name in args.operators.split(",")
        for k, n in args.sizes
        for m in args.rows
    ]
    report(rows, peaks, args)


if __name__ == "__main__":
    main()
