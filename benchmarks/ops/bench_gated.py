"""silu_mul and gelu_mul against the bytes that they move (small cases stay in a cache and pass 100 %)."""

from __future__ import annotations

from functools import partial

import torch
from harness import against_limits, copies, numbers, parser, report, seconds_per_call, start

from llmrt import ops


def main(arguments: list[str] | None = None) -> None:
    """Measure both on the strided halves of one tensor, as a fused gate/up projection gives them."""
    options = parser(__doc__)
    options.add_argument("--rows", type=numbers, default=[1, 16, 512], help="M, comma separated")
    options.add_argument("--sizes", type=numbers, default=[8192], help="intermediate sizes, comma separated")
    args = options.parse_args(arguments)
    peaks, dtype = start(args)
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
    report(rows, peaks, args)


if __name__ == "__main__":
    main()
