"""Quantized linear by oneDNN: torch's own operator for INT4 on Intel GPUs, `aten::_weight_int4pack_mm_with_scales_and_zeros`.

It computes ``x @ ((code - zero) * scale).T`` with x [M, K] of 16 bits, and takes the weight as int32 [N, K / 8] whose bits 4 i .. 4 i + 3
are the code of input 8 j + i (our canonical codes, read as words), scales [K / group, N] of x's dtype and zeros int8 [K / group, N]; a
group is a multiple of 32 inputs that divides K (torch 2.13: aten/src/ATen/native/mkldnn/xpu/Blas.cpp and detail/WoQMatmul.cpp). Weights
are rounded to x's dtype on their way into the product.

The packed weight of every other kernel has its words in another order. So a weight that this operator multiplies is held a second time,
from the first product on and as long as the packed one lives: 0.5 bytes per weight and its scales and zeros, about the packed weight's
size again. That is why this route is asked for (`LLMRT_XPU_ONEDNN=1` where it is the better one, `LLMRT_XPU_KERNELS=torch` for every
product that it serves) and not taken by itself.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops
from ..ops.formats import TILE_N, Layout
from ..ops.linear import GATED, activate
from .route import route

OPERATOR = "aten::_weight_int4pack_mm_with_scales_and_zeros"
#: The environment variable that lets the table prefer this route.
ASKED_BY = "LLMRT_XPU_ONEDNN"
#: A group is a multiple of it.
GROUP_STEP = 32
#: Outputs whose codes are unpacked at a time, which takes a few bytes for each weight.
OUTPUTS_AT_A_TIME = 64 * TILE_N
#: The compute whose arithmetic it is, by the dtype of x.
_COMPUTES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class Reordered(NamedTuple):
    """A weight as oneDNN takes it.

    Args:
        codes: int32 [N, K / 8].
        scales: [K / group, N].
        zeros: int8 [K / group, N].
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor


#: packed weight -> (its mutation count, its layout, the same weight for oneDNN).
_held: Any = WeakTensorKeyDictionary()


def asked() -> bool:
    """Return whether the user wants this route where it serves.

    Raises:
        ValueError: the environment variable has another value than 0 and 1.
    """
    value = os.environ.get(ASKED_BY, "").strip()
    if value not in ("", "0", "1"):
        raise ValueError(f"{ASKED_BY} is {value!r}; valid: 0, 1")
    return value == "1"


def available(device: torch.device) -> bool:
    """Return whether this torch has the operator for a kind of device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(OPERATOR, device.type.upper())


def held_bytes() -> int:
    """Return the bytes of all weights that are held a second time."""
    return sum(tensor.nbytes for _, _, weight in _held.values() for tensor in weight)


def _refuses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    layout: str,
    out_features: int,
    compute: str = "int8",
    epilogue: str = "none",
) -> str | None:
    form, inputs = Layout.parse(layout), x.shape[-1]
    group = form.geometry(inputs).group
    if form.weight_dtype != "int4":
        return f"oneDNN's product is of int4, not {form.weight_dtype}"
    if _COMPUTES.get(x.dtype) != compute:
        return f"oneDNN multiplies in bf16 or fp16, the dtype of x, which is {str(x.dtype)[6:]}; compute is {compute}"
    if form.scale_dtype != x.dtype:
        return f"oneDNN's scales have the dtype of x, {str(x.dtype)[6:]}, these {str(form.scale_dtype)[6:]}"
    if group % GROUP_STEP or inputs % group:
        return f"oneDNN's groups are multiples of {GROUP_STEP} that divide K, here {group} of {inputs}"
    if weight._is_view():
        return "weight is a view: a second copy could not be kept with it"
    return None if available(x.device) else f"this PyTorch has no {OPERATOR} for {x.device.type}"


def reordered(packed: Tensor, layout: str, rows: int, in_features: int) -> Reordered:
    """Return a packed weight as oneDNN takes it: the one that is held for it, or a new one if there is none or the weight was changed.

    Args:
        packed: uint8 [ceil(N / 32), tiles, tile_bytes].
        layout: text of its `Layout`.
        rows: N.
        in_features: K.
    """
    version = -1 if packed.is_inference() else packed._version
    known = _held.get(packed)
    if known is not None and known[:2] == (version, layout):
        weight: Reordered = known[2]
        return weight
    made = _reordered(packed, layout, rows, in_features)
    _held[packed] = version, layout, made
    return made


def _reordered(packed: Tensor, layout: str, rows: int, in_features: int) -> Reordered:
    form, parts = Layout.parse(layout), []
    for start in range(0, rows, OUTPUTS_AT_A_TIME):
        here = min(OUTPUTS_AT_A_TIME, rows - start)
        tiles = packed.narrow(0, start // TILE_N, -(-here // TILE_N))
        codes, scales, zeros = ops.unpack_weight(tiles, layout, here, in_features)
        if not form.asymmetric:
            zeros = torch.full_like(scales, form.format.zero, dtype=torch.int8)
        parts.append((codes.view(torch.int32), scales.T, zeros.T.to(torch.int8)))
    return Reordered(
        *(torch.cat(one, dim).contiguous() for one, dim in zip(zip(*parts, strict=True), (0, 1, 1), strict=True))
    )


@route("torch", "quant_linear", _refuses)
def quant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    layout: str,
    out_features: int,
    compute: str = "int8",
    epilogue: str = "none",
) -> Tensor:
    """Run `ops.quant_linear`; the product is rounded to the dtype of x before bias and epilogue, which are computed in float32."""
    out = ops.quant_linear.empty(x, weight, bias, other, layout, out_features, compute, epilogue)
    if not out.numel():
        return out
    rows = 2 * (-(-out_features // 16) * 16) if epilogue in GATED else out_features
    there = reordered(weight, layout, rows, x.shape[-1])
    group = Layout.parse(layout).geometry(x.shape[-1]).group
    product = torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros.default
    y: Tensor = product(x.reshape(-1, x.shape[-1]).contiguous(), there.codes, group, there.scales, there.zeros)
    return _finished(y, bias, other, out_features, epilogue).reshape(out.shape)


def _finished(y: Tensor, bias: Tensor | None, other: Tensor | None, out_features: int, epilogue: str) -> Tensor:
    """Return what bias and epilogue make of a product [M, N], rounded once."""
    if bias is None and epilogue == "none":
        return y
    v = y.float() if bias is None else y.float() + bias.float()
    if epilogue in GATED:
        gate, up = v.view(y.shape[0], -1, 2, 16).unbind(2)
        v = (activate(gate, epilogue) * up).flatten(1).narrow(1, 0, out_features)
    elif other is not None:
        addend = other.reshape(v.shape)
        v = v + addend if epilogue == "add" else v * addend
    elif epilogue != "none":
        v = activate(v, epilogue)
    return v.to(y.dtype)
