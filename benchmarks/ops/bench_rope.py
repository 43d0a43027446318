"""rope against the bytes that it moves (small cases stay in a cache and pass 100 %)."""

from __future__ import annotations

from functools import partial

import torch
from harness import against_limits, copies, numbers, parser, report, seconds_per_call, start

from llmrt import ops


def main(arguments: list[str] | None = None) -> None:
    """Measure both pairings on the strided parts of one tensor, as a fused q, k, v projection gives them."""
    options = parser(__doc__)
    options.add_argument("--tokens", type=numbers, default=[1, 16, 512], help="S, comma separated")
    options.add_argument("--heads", default="32x8x64", help="HxHkxD: query heads, key/value heads, head dimension")
    args = options.parse_args(arguments)
    peaks, dtype = start(args)
    h, hk, d = (int(part) for part in args.heads.split("x"))
    rows = []
    for tokens in args.tokens:
        moved = 2 * tokens * (h + hk) * d * dtype.itemsize
        angles = torch.rand(1, tokens, d)
        cos, sin = angles.cos(), angles.sin()
        inputs = []
        for _ in range(copies(moved)):
            fused = torch.randn(1, tokens, h + 2 * hk, d).to(dtype)
            inputs.append((fused[:, :, :h], fused[:, :, h : h + hk]))
        for name, interleaved in (("half-rotate", False), ("interleaved", True)):
            calls = [partial(ops.rope, q, k, cos, sin, None, 0, interleaved) for q, k in inputs]
            seconds = seconds_per_call(calls, args.seconds)
            case = {"op": name, "S": tokens, "H": h, "Hk": hk, "D": d}
            rows.append(case | against_limits(seconds, moved, 0.0, peaks, "fp32"))
    report(rows, peaks, args)


if __name__ == "__main__":
    main()
