"""Norms against the bytes that they move, from one token to a prompt (small cases stay in a cache and pass 100 %)."""

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
    options.add_argument("--sizes", type=numbers, default=[2048, 8192], help="hidden sizes, comma separated")
    return options.parse_args(arguments)


def measure(args: argparse.Namespace, peaks: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Measure rms_norm, add_rms_norm, layer_norm and add_layer_norm."""
    rows = []
    for hidden in args.sizes:
        weight, bias = (torch.randn(hidden).to(dtype) for _ in range(2))
        for m in args.rows:
            size = m * hidden * dtype.itemsize
            pairs = [[torch.randn(m, hidden).to(dtype) for _ in range(2)] for _ in range(copies(4 * size))]
            for name, moves, calls in (
                ("rms_norm", 2, [partial(ops.rms_norm, x, weight, 1e-5) for x, _ in pairs]),
                ("add_rms_norm", 4, [partial(ops.add_rms_norm, x, y, weight, 1e-5) for x, y in pairs]),
                ("layer_norm", 2, [partial(ops.layer_norm, x, weight, bias, 1e-5) for x, _ in pairs]),
                ("add_layer_norm", 4, [partial(ops.add_layer_norm, x, y, weight, bias, 1e-5) for x, y in pairs]),
            ):
                seconds = seconds_per_call(calls, args.seconds)
                rows.append(
                    {"op": name, "M": m, "hidden": hidden} | against_limits(seconds, moves * size, 0.0, peaks, "fp32")
                )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    run(parse, measure, arguments)


if __name__ == "__main__":
    main()
