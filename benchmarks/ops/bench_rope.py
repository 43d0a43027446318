"""rope and rope_append against the bytes that they move (small cases stay in a cache and pass 100 %)."""

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
    options.add_argument("--heads", default="32x8x64", help="HxHkxD: query heads, key/value heads, head dimension")
    return options.parse_args(arguments)


def measure(args: argparse.Namespace, peaks: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Measure on the strided parts of one tensor, as a fused q, k, v projection gives them."""
    h, hk, d = (int(part) for part in args.heads.split("x"))
    rows = []
    for tokens in args.tokens:
        rotated, kept = 2 * tokens * (h + hk) * d * dtype.itemsize, 2 * tokens * hk * d * dtype.itemsize
        angles = torch.rand(1, tokens, d)
        cos, sin, weight = angles.cos(), angles.sin(), torch.rand(d)
        inputs = []
        for _ in range(copies(rotated)):
            fused = torch.randn(1, tokens, h + 2 * hk, d).to(dtype)
            caches = torch.zeros(2, 1, hk, tokens, d, dtype=dtype).unbind(0)
            inputs.append((fused.split((h, hk, hk), 2), caches))
        norms = {"query_weight": weight, "key_weight": weight}
        cases = {
            "half-rotate": [partial(ops.rope, q, k, cos, sin) for (q, k, _), _ in inputs],
            "interleaved": [partial(ops.rope, q, k, cos, sin, None, 0, True) for (q, k, _), _ in inputs],
            "norms": [partial(ops.rope, q, k, cos, sin, **norms) for (q, k, _), _ in inputs],
            "append": [partial(ops.rope_append, *qkv, cos, sin, *caches, 0) for qkv, caches in inputs],
            "norms, append": [partial(ops.rope_append, *qkv, cos, sin, *caches, 0, **norms) for qkv, caches in inputs],
        }
        for name, calls in cases.items():
            seconds, moved = seconds_per_call(calls, args.seconds), rotated + kept * name.endswith("append")
            case = {"op": name, "S": tokens, "H": h, "Hk": hk, "D": d}
            rows.append(case | against_limits(seconds, moved, 0.0, peaks, "fp32"))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    run(parse, measure, arguments)


if __name__ == "__main__":
    main()
