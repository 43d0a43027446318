"""Static INT8 linears: activations are rounded with one known scale, products and sums are integers to the end."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from ...ops.linear import GATED
from ..route import route
from . import blocks
from .activations import round_even
from .decode import Packed, refuses_weight, segment_integers
from .launch import launch, refuses_double, strides
from .products import finish, keep

# mypy: disable-error-code="no-untyped-def"


@triton.jit
def _round_rows(x, factors, codes, flags, inputs, padded, inverse, zero, x_row, x_column, f_column,
                BLOCK: tl.constexpr):  # fmt: skip
    """x [M, K] to int8 codes - 128 [M, padded], 0 past K, and flags [M]: 0, or NaN for a row with a NaN."""
    row = tl.program_id(0).to(tl.int64)
    bad = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, padded, BLOCK):
        k = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * x_row + k * x_column, k < inputs, other=0.0).to(tl.float32)
        if factors is not None:
            v = v * tl.load(factors + k * f_column, k < inputs, other=1.0)
        v = v * inverse
        bad += tl.where(v == v, 0.0, 1.0)
        v = tl.where(v == v, v, 0.0)
        lowest = 0.0 - zero
        code = round_even(tl.minimum(tl.maximum(v, lowest), lowest + 255.0)).to(tl.int32) + zero - 128
        tl.store(codes + row * padded + k, tl.where(k < inputs, code, 0).to(tl.int8), k < padded)
    some = tl.max(bad, 0) > 0.0
    tl.store(flags + row, tl.where(some, float("nan"), 0.0))


@triton.jit
def _finish_static(acc, scales, sums, flags, bias, other, y, m, alive, n0, tiles, weight_rows, outputs, input_scale, offset,
                   o_row, o_column, b_stride, TILE_SCALES: tl.constexpr, SCALES_AT: tl.constexpr, EPILOGUE: tl.constexpr,
                   GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Integers to floating point: each output has one scale, which stands in its first tile."""
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    inside = n < weight_rows
    acc += offset * tl.load(sums + n, inside, other=0)
    at = (n // 32).to(tl.int64) * tiles * TILE_SCALES + SCALES_AT + n % 32
    scale = input_scale * tl.load(scales + at, inside, other=0.0).to(tl.float32)
    total = acc.to(tl.float32) * scale + tl.load(flags + m, alive, other=0.0)
    finish(total, y, bias, other, m, alive, n0, outputs, o_row, o_column, b_stride, EPILOGUE, GATED, BLOCK_M, BLOCK_N)


@triton.jit
def _static_matmul(x, codes, scales, sums, flags, bias, other, y, partial, rows, tiles, weight_rows, outputs, input_scale, offset,
                   per_part, o_row, o_column, b_stride, TILE_DWORDS: tl.constexpr, TILE_SCALES: tl.constexpr,
                   SCALES_AT: tl.constexpr, EPILOGUE: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr):  # fmt: skip
    """x: codes - 128 [M, tiles * 128]; offset: 128 - the zero point, times the weight's row sums."""
    row_blocks = tl.cdiv(rows, BLOCK_M)
    m = (tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    n0 = tl.program_id(0) // row_blocks * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    inside, alive = n < weight_rows, m < rows
    base = (n // 32).to(tl.int64) * tiles * TILE_DWORDS + n % 32
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    first = tl.program_id(1) * per_part
    for tile in range(first, tl.minimum(first + per_part, tiles)):
        w = segment_integers(codes, base, tile, inside, 8, 128, BLOCK_N, TILE_DWORDS)
        a = tl.load(x + m * (tiles * 128) + tile * 128 + tl.arange(0, 128)[None, :], alive, other=0)
        acc += tl.dot(a, w, out_dtype=tl.int32)
    if partial is not None:
        keep(acc, partial, m, alive, n0, rows, weight_rows, BLOCK_N)
    else:
        _finish_static(acc, scales, sums, flags, bias, other, y, m, alive, n0, tiles, weight_rows, outputs, input_scale, offset,
                       o_row, o_column, b_stride, TILE_SCALES, SCALES_AT, EPILOGUE, GATED, BLOCK_M, BLOCK_N)  # fmt: skip


@triton.jit
def _static_join(partial, scales, sums, flags, bias, other, y, rows, tiles, weight_rows, outputs, parts, input_scale, offset,
                 o_row, o_column, b_stride, TILE_SCALES: tl.constexpr, SCALES_AT: tl.constexpr, EPILOGUE: tl.constexpr,
                 GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The sum of all parts, and what follows it."""
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    n0 = tl.program_id(0) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for part in range(0, parts):
        acc += tl.load(partial + (part * rows + m) * weight_rows + n, (m < rows) & (n < weight_rows), other=0)
    _finish_static(acc, scales, sums, flags, bias, other, y, m, m < rows, n0, tiles, weight_rows, outputs, input_scale, offset,
                   o_row, o_column, b_stride, TILE_SCALES, SCALES_AT, EPILOGUE, GATED, BLOCK_M, BLOCK_N)  # fmt: skip


def _refuses(
    x: Tensor,
    weight: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    factors: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> str | None:
    return refuses_double(x, bias, factors) or refuses_weight(weight)


@route("triton", "static_linear", _refuses)
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
    """See `llmrt.ops.static_linear`."""
    y = ops.static_linear.empty(
        x, weight, sums, bias, other, factors, input_scale, input_zero, layout, out_features, epilogue
    )
    if not y.numel():
        return y
    gated, k = epilogue in GATED, x.shape[-1]
    m, weight_rows = y.numel() // out_features, len(sums)
    packed = Packed(weight, layout, weight_rows, k, "int8")
    padded, device = packed.tiles * 128, x.device
    rounded = torch.empty((m, padded), dtype=torch.int8, device=device)
    flags = torch.empty(m, dtype=torch.float32, device=device)
    flat = x.reshape(-1, k)
    inverse = float(torch.full((), input_scale, dtype=torch.float32).reciprocal())
    launch(
        _round_rows,
        blocks.columns(padded),
        lambda b: (m,),
        (),
        *(flat, factors, rounded, flags, k, padded, inverse, input_zero, *flat.stride(), *strides(factors, 1)),
        enable_fp_fusion=False,
    )
    addend = None if other is None else other.reshape(-1, out_features)
    choices = blocks.matmul(m, weight_rows, True)

    def programs(b: blocks.Blocks) -> int:
        return triton.cdiv(m, b.sizes["BLOCK_M"]) * triton.cdiv(weight_rows, b.sizes["BLOCK_N"])

    parts, per_part = blocks.shared(packed.tiles, blocks.parts(programs(choices[0]), m, k, 8))
    partial = torch.empty((parts, m, weight_rows), dtype=torch.int32, device=device) if parts > 1 else None
    given = (packed.scales, sums.contiguous(), flags, bias, addend, y)
    sizes, last = (m, packed.tiles, weight_rows, out_features), (input_scale, 128 - input_zero)
    places = (*strides(addend, 2), *strides(bias, 1))
    constants = {name: packed.constants[name] for name in ("TILE_SCALES", "SCALES_AT")}
    constants |= {"EPILOGUE": epilogue, "GATED": gated}
    launch(
        _static_matmul,
        choices,
        lambda b: (programs(b), parts),
        (m, weight_rows, k, layout),
        *(rounded, packed.codes, *given, partial, *sizes, *last, per_part, *places),
        TILE_DWORDS=packed.constants["TILE_DWORDS"],
        **constants,
    )
    if partial is not None:
        launch(
            _static_join,
            blocks.joins(m),
            lambda b: (triton.cdiv(weight_rows, b.sizes["BLOCK_N"]), triton.cdiv(m, b.sizes["BLOCK_M"])),
            (),
            *(partial, *given, *sizes, parts, *last, *places),
            **constants,
        )
    return y
