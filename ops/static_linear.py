"""Statically quantized linear (W8A8): both factors of the product are 8 bit, the activations' scale is known beforehand."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .check import check, check_dtype, check_floating, check_shape
from .formats import TILE_N, Layout, interleave_gate_up, quantize
from .linear import EPILOGUES, GATED, activate, pack_weight, unpack_weight
from .norm import wide
from .operator import Sample, operator

#: Of in_features: sums of so many products of 8-bit numbers fit 32 bits.
MOST_INPUTS = 1 << 16


def weight_sums(codes: Tensor) -> Tensor:
    """Return int32 [N]: per output the sum of (code - 128) over the inputs, for codes uint8 [N, K]."""
    return codes.sum(1, dtype=torch.int32) - 128 * codes.shape[1]


def _check(
    x: Tensor,
    weight: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    factors: Tensor | None,
    input_scale: float,
    input_zero: int,
    layout: str,
    out_features: int,
    epilogue: str,
) -> int:
    """Raise RuntimeError unless the arguments fit; return the rows of the weight."""
    check_floating(x, "x")
    check(x.dim() >= 1, "x is a scalar; expected [..., K]")
    check(epilogue in EPILOGUES, f"epilogue is {epilogue!r}; valid: {', '.join(EPILOGUES)}")
    check(0 < input_scale <= 3.4e38, f"input_scale is {input_scale}; valid: above 0 and finite")
    check(0 <= input_zero <= 255, f"input_zero is {input_zero}; valid: 0 to 255")
    form, k = Layout.parse(layout), x.shape[-1]
    check(
        form.weight_dtype == "int8" and not form.asymmetric and form.group_size == -1,
        f"layout is {layout!r}; expected int8_sym_channel_ and the dtype of the scales",
    )
    check(k <= MOST_INPUTS, f"x has {k} features; valid: at most {MOST_INPUTS}")
    check(out_features >= 0, f"out_features is {out_features}; valid: at least 0")
    rows, sizes = 2 * (-(-out_features // 16) * 16) if epilogue in GATED else out_features, form.geometry(k)
    check_dtype(weight, torch.uint8, "weight")
    check_shape(weight, (-(-rows // TILE_N), sizes.tiles, sizes.tile_bytes), "weight")
    check_dtype(sums, torch.int32, "sums")
    check_shape(sums, (rows,), "sums")
    if bias is not None:
        check_floating(bias, "bias")
        check_shape(bias, (rows,), "bias")
    if factors is not None:
        check(
            factors.dtype in (torch.float32, torch.float64),
            f"factors has dtype {str(factors.dtype)[6:]}; expected float32",
        )
        check_shape(factors, (k,), "factors")
    check(
        (other is not None) == (epilogue in ("add", "mul")),
        f"other {'missing' if other is None else 'given'} for epilogue {epilogue!r}",
    )
    if other is not None:
        check_shape(other, (*x.shape[:-1], out_features), "other")
        check(other.dtype == x.dtype, f"other has dtype {str(other.dtype)[6:]}; expected that of x, {str(x.dtype)[6:]}")
    return rows


def quantize_input(x: Tensor, factors: Tensor | None, input_scale: float, input_zero: int) -> Tensor:
    """Return code - input_zero of every element of x [..., K], float32: clamp(round(x * factors * (1 / scale)), -zero, 255 - zero).

    Each step is one rounded float32 operation, so that every implementation gives the same codes. A row with a NaN is NaN.
    """
    v = x.float() if factors is None else x.float() * factors.float()
    inverse = torch.full((), input_scale, dtype=torch.float32).reciprocal()
    codes = torch.round((v * inverse).clamp(-input_zero, 255 - input_zero))
    return torch.where(codes.isnan().any(-1, keepdim=True), torch.nan, codes)


@operator()
def static_linear(
    x: Tensor,
    weight: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    factors: Tensor | None,
    input_scale: float,
    input_zero: int,
    layout: str,
    out_features: int,
    epilogue: str = "none",
) -> Tensor:
    """Linear layer in 8 bits: ``y = epilogue(scale * sW[n] * sum_k (qA[m, k] - zero) * (qW[n, k] - 128) + bias)``.

    Activations are rounded to 8 bits with one scale and zero point for all of them, known beforehand, after the multiplication
    with one factor per input, by whose inverse the weight was multiplied (SmoothQuant, Xiao et al. 2022, equation 3). The sums
    over k are exact integers; the zero point enters through the weight's row sums. The result is rounded once at the end.

    Args:
        x: [..., K] float32, bfloat16 or float16, K at most 65536. What lies outside of the range of the codes is clamped.
        weight: uint8 [ceil(N / 32), tiles, tile_bytes] from `pack_weight`.
        sums: int32 [N], `weight_sums` of the weight's codes.
        bias: [N], any floating dtype, or None.
        other: [..., out_features] in the dtype of x, for the epilogues add and mul; else None.
        factors: float32 [K], positive and finite, or None for ones.
        input_scale: of the activations.
        input_zero: the code of the activation 0, in 0 .. 255.
        layout: of the weight: int8_sym_channel_f32, _bf16 or _f16.
        out_features: width of the output. N, or for the gated epilogues half of the weight's rows.
        epilogue: as of `quant_linear`.

    Returns:
        [..., out_features] in the dtype of x; NaN in rows of x that have a NaN.

    Raises:
        RuntimeError: an argument does not fit, with its name, its value and what is valid.
    """
    rows = _check(x, weight, sums, bias, other, factors, input_scale, input_zero, layout, out_features, epilogue)
    codes, scales, _ = unpack_weight.reference(weight, layout, rows, x.shape[-1])
    dtype = wide(x).dtype
    v = quantize_input(x, factors, input_scale, input_zero).to(dtype).reshape(-1, x.shape[-1])
    y = v.double() @ (codes.double() - 128).T  # exact: sums stay below 2^53
    y = y.to(dtype) * (input_scale * scales.to(dtype).T)
    if bias is not None:
        y = y + bias.to(dtype)
    if epilogue in GATED:
        gate, up = y.view(-1, rows // 32, 2, 16).unbind(2)
        y = (activate(gate, epilogue) * up).flatten(1)[:, :out_features]
    elif other is not None:
        y = y + other.reshape(y.shape) if epilogue == "add" else y * other.reshape(y.shape)
    elif epilogue != "none":
        y = activate(y, epilogue)
    return y.reshape(*x.shape[:-1], out_features).to(x.dtype)


@static_linear.fake
def _(
    x: Tensor,
    weight: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    factors: Tensor | None,
    input_scale: float,
    input_zero: int,
    layout: str,
    out_features: int,
    epilogue: str = "none",
) -> Tensor:
    _check(x, weight, sums, bias, other, factors, input_scale, input_zero, layout, out_features, epilogue)
    return x.new_empty((*x.shape[:-1], out_features))


def _sample(
    m: tuple[int, ...], n: int, k: int, dtype: torch.dtype, scale_dtype: torch.dtype, epilogue: str, odd: bool
) -> Sample:
    """Return a call with inputs of different ranges, some outside of the codes' range."""
    layout, gated = Layout("int8", False, -1, scale_dtype), epilogue in GATED
    weight = torch.randn(2 * n if gated else n, k) / k**0.5
    codes, scales, _ = quantize(interleave_gate_up(*weight.chunk(2)) if gated else weight, layout)
    packed, rows = pack_weight.reference(codes, scales, None, str(layout), k), len(codes)
    spread = torch.exp(torch.randn(k))
    x = (torch.randn(*m, k) * spread + 0.5 * odd).to(dtype)
    other = torch.randn(*m, n, dtype=dtype) if epilogue in ("add", "mul") else None
    bias = torch.randn(rows, dtype=dtype if n % 2 else torch.float32) if odd else None
    scale, zero = (0.031, 97) if odd else (0.11, 128)
    factors = None if odd and n % 3 == 0 else 1 / spread
    args = (x, packed, weight_sums(codes), bias, other, factors, scale, zero, str(layout), n, epilogue)
    return Sample(f"{layout} {m}x{n}x{k} {epilogue}", args)


@static_linear.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    scales = (torch.float32, torch.bfloat16, torch.float16)
    shapes = (((1,), 33, 256), ((2, 3), 64, 300), ((13,), 7, 131), ((1, 40), 96, 128), ((3,), 1, 1), ((9,), 50, 9))
    for i, (m, n, k) in enumerate(shapes):
        for odd in (False, True):
            yield _sample(m, n, k, dtype, scales[i % 3], "none", odd)
    for i, epilogue in enumerate(EPILOGUES):
        yield _sample((1 + 5 * i,), 40 + i, 160, dtype, scales[i % 3], epilogue, bool(i % 2))
    for m in (*range(1, 13), 25, 33, 150, 0):
        yield _sample((m,), 48, 256, dtype, torch.float32, "none", bool(m % 2))
    strided = _sample((4,), 32, 160, dtype, torch.float32, "none", False)
    yield Sample("row stride", (torch.randn(4, 320, dtype=dtype)[:, :160], *strided.args[1:]))
