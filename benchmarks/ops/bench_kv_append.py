"""kv_append against the bytes that it moves (small cases stay in a cache and pass 100 %)."""

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
    options.add_argument("--tokens", type=numbers, default=[1, 16, 512], help="S, comma separated")
    options.add_argument("--heads", default="8x64", help="HkxD: key/value heads, head dimension")
    return options.parse_args(arguments)


def measure(args: argparse.Namespace, peaks: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Measure on the strided parts of one tensor, as a fused q, k, v projection gives them."""
    hk, d = (int(part) for part in args.heads.split("x"))
    rows = []
    for tokens in args.tokens:
        moved = 4 * tokens * hk * d * dtype.itemsize
        calls = []
        for _ in range(copies(moved)):
            key, value = torch.randn(1, tokens, 2 * hk, d).to(dtype).chunk(2, 2)
            caches = torch.zeros(2, 1, hk, tokens + 64, d, dtype=dtype).unbind(0)
            calls.append(partial(ops.kv_append, *caches, key, value, 32))
        case = {"op": "kv_append", "S": tokens, "Hk": hk, "D": d}
        rows.append(case | against_limits(seconds_per_call(calls, args.seconds), moved, 0.0, peaks, "fp32"))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    run(parse, measure, arguments)


if __name__ == "__main__":
    main()
