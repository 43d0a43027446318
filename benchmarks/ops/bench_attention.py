"""attention against its floors: decode and chunks read the cached keys and values, prompts compute two products.

Example:

    python benchmarks/ops/bench_attention.py --cases 1x512,1x8192,512x512 --heads 32x8x64 --kv-dtype int8
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import against_limits, against_rivals, alternate, copies, numbers, parser, run
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmrt import ops
from llmrt.llm.huge_pages import empty


def pairs(text: str) -> list[tuple[int, int]]:
    """Parse SxT pairs."""
    return [(int(s), int(t)) for s, t in (pair.split("x") for pair in text.split(","))]


def rival(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Any]:
    """Return torch's call for the same result: without a mask where it can do without, else with a boolean one."""
    s, t = query.shape[1], key.shape[2]
    settings: dict[str, Any] = {"enable_gqa": True, "is_causal": s == t and s > 1}
    if 1 < s < t:
        settings["attn_mask"] = torch.ones(s, t, dtype=torch.bool).tril(t - s)
    return partial(scaled_dot_product_attention, query.transpose(1, 2), key, value, **settings)


def case(
    batch: int,
    queries: int,
    length: int,
    heads: list[int],
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    peaks: dict[str, float],
    args: Any,
) -> dict[str, Any]:
    """Measure S query tokens at the end of T cached ones."""
    h, hk, d = heads
    shape = (batch, hk, length, ops.stored_width(d, kv_dtype))
    cache_bytes = 2 * math.prod(shape) * kv_dtype.itemsize
    data = []
    for _ in range(copies(cache_bytes)):
        key, value = (empty(shape, kv_dtype, torch.device("cpu")) for _ in range(2))
        ops.kv_append(key, value, *torch.randn(2, batch, length, hk, d).to(dtype), 0)
        data.append((torch.randn(batch, queries, h, d).to(dtype), key, value))
    # Pairs (query, key) that a causal mask leaves, times heads, two products of D each.
    seen = queries * length - queries * (queries - 1) // 2
    ops_count = 4.0 * batch * h * d * seen
    moved = cache_bytes + 2 * batch * queries * h * d * dtype.itemsize
    unit = "fp32" if dtype == torch.float32 else "bf16"
    name = {"B": batch, "S": queries, "T": length, "H": h, "Hk": hk, "D": d, "cache": str(kv_dtype)[6:]}
    contestants = [[partial(ops.attention, *one, length, d**-0.5) for one in data]]
    if args.rivals and kv_dtype == dtype:
        contestants.append([rival(*one) for one in data])
    ours, *theirs = alternate(contestants, args.seconds)
    row = name | against_limits(ours, moved, ops_count, peaks, unit)
    return row | against_rivals(ours, dict(zip(["sdpa"], theirs, strict=False)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    options = parser(__doc__)
    options.add_argument(
        "--cases", type=pairs, default=pairs("1x512,1x2048,1x8192,8x2048,512x512,512x2048"), help="SxT, comma separated"
    )
    options.add_argument("--heads", default="32x8x64", help="HxHkxD: query heads, key/value heads, head dimension")
    options.add_argument(
        "--kv-dtype", default="", help="of the cache: float32, bfloat16, float16, int8; default: --dtype"
    )
    options.add_argument("--batches", type=numbers, default=[1], help="comma separated")
    options.add_argument("--rivals", action="store_true", help="in turn with torch's scaled_dot_product_attention")
    return options.parse_args(arguments)


def measure(args: argparse.Namespace, peaks: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Measure all cases."""
    heads = [int(part) for part in args.heads.split("x")]
    kv_dtype = getattr(torch, args.kv_dtype) if args.kv_dtype else dtype
    return [case(b, s, t, heads, dtype, kv_dtype, peaks, args) for b in args.batches for s, t in args.cases]


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    run(parse, measure, arguments)


if __name__ == "__main__":
    main()
