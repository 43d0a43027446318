"""Triton's kernels on a CUDA or XPU GPU: INT4 and static INT8 linears against bf16 matmul and the memory's rate, experts against a loop
over those that are chosen, attention against torch's SDPA.

Medians of triton.testing.do_bench, which empties the caches between calls. The memory's rate is that of a copy of 1 GiB.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from harness import numbers, sizes
from torch.nn.functional import scaled_dot_product_attention

from llmrt import ops, xpu
from llmrt.ops import Layout


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=numbers, default=[1, 16, 512], help="M, comma separated")
    options.add_argument("--sizes", type=sizes, default=[(4096, 4096), (4096, 14336), (14336, 4096)], help="KxN")
    options.add_argument("--layout", default=str(Layout()), help="of the weights")
    options.add_argument("--computes", default="int8,bf16", help="of the linears, comma separated")
    options.add_argument(
        "--experts", type=numbers, default=[64, 8, 2048, 1024], help="experts, chosen, features, width"
    )
    options.add_argument("--tokens", type=numbers, default=[1, 512, 4096], help="query tokens, comma separated")
    options.add_argument("--cached", type=int, default=4096, help="tokens in the cache")
    options.add_argument("--json", type=Path, help="write all figures to this file")
    return options.parse_args(arguments)


def gpu() -> tuple[str, str]:
    """Return the kind of GPU that this machine has, and its name.

    Raises:
        SystemExit: it has none that PyTorch can use.
    """
    for kind in ("cuda", "xpu"):
        if getattr(torch, kind).is_available():
            return kind, torch.get_device_module(kind).get_device_name()
    raise SystemExit(
        f"bench_triton needs a CUDA or XPU GPU; PyTorch {torch.__version__} sees none here, and the times of interpreted "
        "kernels would mean nothing"
    )


def seconds(call: Any) -> float:
    """Return the median time of one call."""
    from triton.testing import do_bench

    return do_bench(call, warmup=50, rep=200, return_mode="median") / 1e3


def check(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raise AssertionError where a result that is to be timed is wrong."""
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


def linears(args: argparse.Namespace, device: str, rate: float) -> list[dict[str, Any]]:
    """Time quant_linear and a bf16 matmul of the same size."""
    found = []
    for k, n in args.sizes:
        dense = torch.randn(n, k) / k**0.5
        canonical = ops.quantize(dense, Layout.parse(args.layout))
        packed = ops.pack_weight.reference(*canonical, args.layout, k).to(device)
        dense = dense.to(device, torch.bfloat16)
        for m in args.rows:
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            rival = seconds(lambda: x @ dense.T)  # noqa: B023
            for compute in args.computes.split(","):
                arguments = (x, packed, None, None, args.layout, n, compute)
                check(ops.quant_linear(*arguments), ops.quant_linear.reference(*arguments), 2**-6)
                time = seconds(lambda: ops.quant_linear(*arguments))  # noqa: B023
                row = {"op": "quant_linear", "M": m, "K": k, "N": n, "compute": compute, "us": time * 1e6}
                row |= {"bf16 us": rival * 1e6, "speedup": rival / time, "Tflop/s": 2 * m * n * k / time / 1e12}
                found.append(row | {"GB/s": packed.numel() / time / 1e9, "of the rate": packed.numel() / time / rate})
    return found


def statics(args: argparse.Namespace, device: str, rate: float) -> list[dict[str, Any]]:
    """Time static_linear and a bf16 matmul of the same size."""
    found, layout = [], Layout("int8", False, -1, torch.float32)
    for k, n in args.sizes:
        dense = torch.randn(n, k) / k**0.5
        codes, scales, _ = ops.quantize(dense, layout)
        packed = ops.pack_weight.reference(codes, scales, None, str(layout), k).to(device)
        sums, dense = ops.weight_sums(codes).to(device), dense.to(device, torch.bfloat16)
        for m in args.rows:
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            arguments = (x, packed, sums, None, None, None, 0.03, 128, str(layout), n)
            check(ops.static_linear(*arguments), ops.static_linear.reference(*arguments), 2**-6)
            time, rival = seconds(lambda: ops.static_linear(*arguments)), seconds(lambda: x @ dense.T)  # noqa: B023
            row = {"op": "static_linear", "M": m, "K": k, "N": n, "us": time * 1e6, "bf16 us": rival * 1e6}
            row |= {"speedup": rival / time, "Tflop/s": 2 * m * n * k / time / 1e12}
            found.append(row | {"GB/s": packed.numel() / time / 1e9, "of the rate": packed.numel() / time / rate})
    return found


def loop_over_experts(x: Any, indices: Any, scores: Any, gate_up: Any, down: Any) -> torch.Tensor:
    """Return what experts in bf16 give, run as transformers runs them: one after the other, those that were chosen."""
    y = torch.zeros_like(x)
    for expert in indices.unique().tolist():
        token, place = torch.where(indices == expert)
        gate, up = (x[token] @ gate_up[expert].T).chunk(2, -1)
        out = (torch.nn.functional.silu(gate) * up) @ down[expert].T
        y.index_add_(0, token, scores[token, place, None] * out)
    return y


def experts(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Time quant_experts and the loop over experts in bf16; the rate counts the experts that were chosen, each once."""
    count, chosen, hidden, width = args.experts
    layout, found = Layout.parse(args.layout), []
    up = torch.randn(2 * width, hidden) / hidden**0.5
    down = torch.randn(hidden, width) / width**0.5
    parts = (ops.interleave_gate_up(*up.chunk(2)), hidden), (down, width)
    packed = [ops.pack_weight.reference(*ops.quantize(w, layout), args.layout, k).to(device) for w, k in parts]
    packed = [w.expand(count, *w.shape).contiguous() for w in packed]
    dense = [w.to(device, torch.bfloat16).expand(count, *w.shape).contiguous() for w in (up, down)]
    for m in args.rows:
        x = torch.randn(m, hidden, device=device, dtype=torch.bfloat16)
        indices = torch.rand(m, count, device=device).topk(chosen).indices
        scores = torch.rand(m, chosen, device=device, dtype=torch.bfloat16)
        arguments = (x, indices, scores, *packed, None, None, args.layout, args.layout, width)
        check(ops.quant_experts(*arguments), ops.quant_experts.reference(*arguments), 2**-4)
        time = seconds(lambda: ops.quant_experts(*arguments))  # noqa: B023
        rival = seconds(lambda: loop_over_experts(x, indices, scores, *dense))  # noqa: B023
        read = len(indices.unique()) * sum(w[0].numel() for w in packed)
        row = {
            "op": "quant_experts",
            "M": m,
            "of": f"{chosen} of {count}",
            "us": time * 1e6,
            "bf16 loop us": rival * 1e6,
        }
        found.append(row | {"speedup": rival / time, "GB/s": read / time / 1e9})
    return found


def attentions(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Time causal attention of 32 heads, 8 key/value heads, D 64, 128 and 256, and torch's."""
    found = []
    for width in (64, 128, 256):
        key, value = (torch.randn(1, 8, args.cached, width, device=device, dtype=torch.bfloat16) for _ in range(2))
        for tokens in (t for t in args.tokens if t in (1, args.cached) or t < args.cached):
            query = torch.randn(1, tokens, 32, width, device=device, dtype=torch.bfloat16)
            length = (
                args.cached if tokens in (1, args.cached) else tokens
            )  # SDPA aligns a causal mask at the first token
            arguments = (query, key, value, length, width**-0.5)
            rival_arguments = (query.transpose(1, 2), key[:, :, :length], value[:, :, :length])
            options = {"is_causal": tokens > 1, "enable_gqa": True}
            check(
                ops.attention(*arguments),
                scaled_dot_product_attention(*rival_arguments, **options).transpose(1, 2),
                2**-6,
            )
            time = seconds(lambda: ops.attention(*arguments))  # noqa: B023
            rival = seconds(lambda: scaled_dot_product_attention(*rival_arguments, **options))  # noqa: B023
            row = {"op": "attention", "S": tokens, "T": length, "D": width, "us": time * 1e6}
            found.append(row | {"SDPA us": rival * 1e6, "speedup": rival / time})
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    args, (device, name) = parse(arguments), gpu()
    gigabyte = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    rate = 2 * gigabyte.numel() / seconds(gigabyte.clone)
    del gigabyte
    print(f"{name}, PyTorch {torch.__version__}: a copy moves {rate / 1e9:.0f} GB/s")
    with xpu.install(device, "triton", strict=True):
        rows = (
            linears(args, device, rate) + statics(args, device, rate) + experts(args, device) + attentions(args, device)
        )
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if args.json:
        args.json.write_text(json.dumps({"device": name, "bytes_per_second": rate, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
