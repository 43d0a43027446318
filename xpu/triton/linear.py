"""Linear layers over packed weights: tiles are dequantized in registers on their way into the product."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from ...ops.formats import Layout
from ...ops.linear import GATED
from ..route import route
from . import blocks
from .activations import activate, round_even
from .decode import Packed, code_at, input_of, refuses_weight, scale_of, segment_codes, value_of
from .launch import launch, refuses_double, strides

# mypy: disable-error-code="no-untyped-def"


@triton.jit
def _round_rows(x, codes, scales, sums, inputs, group, padded_group, segments, x_row, x_column, PADDED: tl.constexpr,
                SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr):  # fmt: skip
    """x [M, K] to int8 codes [M, segments * SEGMENT], float32 scales and int32 sums of codes [M, segments]."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1) * SEGMENTS + tl.arange(0, SEGMENTS)[:, None]
    p = segment * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    k, there = input_of(p, group, padded_group, inputs, PADDED)
    v = tl.load(x + row * x_row + k * x_column, there & (segment < segments), other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(v), 1, keep_dims=True)
    some = largest > 0.0
    inverse = tl.where(some, tl.div_rn(127.0, tl.where(some, largest, 1.0)), 0.0)
    code = tl.minimum(tl.maximum(round_even(v * inverse), -127.0), 127.0).to(tl.int8)
    scale = tl.div_rn(largest, 127.0) + tl.sum(v * 0.0, 1, keep_dims=True)  # NaN and infinity make it NaN
    tl.store(codes + row * segments * SEGMENT + p, code, segment < segments)
    tl.store(scales + row * segments + segment, scale, segment < segments)
    if sums is not None:
        total = tl.sum(code.to(tl.int32), 1, keep_dims=True)
        tl.store(sums + row * segments + segment, total, segment < segments)


@triton.jit
def _finish(acc, y, bias, other, m, n0, rows, outputs, o_row, o_column, b_stride, EPILOGUE: tl.constexpr,
            GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Bias, epilogue and store of acc [BLOCK_M, BLOCK_N], outputs n0 .. of the weight for rows m [BLOCK_M, 1]."""
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    if bias is not None:
        last = (outputs + 15) // 16 * 32 if GATED else outputs
        acc += tl.load(bias + n * b_stride, n < last, other=0.0).to(tl.float32)
    if GATED:  # 16 gates, their 16 ups, and so on
        pairs = tl.permute(tl.reshape(acc, (BLOCK_M, BLOCK_N // 32, 2, 16)), (0, 1, 3, 2))
        gate, up = tl.split(pairs)
        acc = tl.reshape(activate(gate, EPILOGUE) * up, (BLOCK_M, BLOCK_N // 2))
        n = n0 // 2 + tl.arange(0, BLOCK_N // 2)[None, :]
    else:
        acc = activate(acc, EPILOGUE)
    inside = (m < rows) & (n < outputs)
    if other is not None:
        v = tl.load(other + m * o_row + n * o_column, inside, other=0.0).to(tl.float32)
        acc = acc + v if EPILOGUE == "add" else acc * v
    tl.store(y + m * outputs + n, acc.to(y.dtype.element_ty), inside)


@triton.jit
def _matmul(x, row_scales, row_sums, codes, scales, zeros, book, bias, other, y, rows, inputs, group, padded_group, tiles,
            segments, weight_rows, outputs, unit, x_row, x_column, o_row, o_column, b_stride, INTEGER: tl.constexpr,
            ROUND: tl.constexpr, BITS: tl.constexpr, CODING: tl.constexpr, CENTER: tl.constexpr, E8M0: tl.constexpr,
            PADDED: tl.constexpr, SEGMENT: tl.constexpr, TILE_DWORDS: tl.constexpr, TILE_SCALES: tl.constexpr,
            SCALES_AT: tl.constexpr, TILE_BYTES: tl.constexpr, ZEROS_AT: tl.constexpr, EPILOGUE: tl.constexpr,
            GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """x [M, K] with strides, or with INTEGER its codes [M, segments * SEGMENT]; programs of one block of outputs are neighbors, so that
    they share its tiles in the cache."""
    row_blocks = tl.cdiv(rows, BLOCK_M)
    m = (tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    n0 = tl.program_id(0) // row_blocks * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    tile = (n // 32).to(tl.int64) * tiles
    inside = n < weight_rows
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for segment in range(0, segments):
        code = segment_codes(codes, tile * TILE_DWORDS + n % 32, segment, inside, BITS, SEGMENT, BLOCK_N, TILE_DWORDS)
        this = tile + segment * SEGMENT // 128
        slot = segment * SEGMENT % 128 // SEGMENT * 32 + n % 32
        scale = scale_of(tl.load(scales + this * TILE_SCALES + SCALES_AT + slot, inside, other=0), E8M0)
        p = segment * SEGMENT + tl.arange(0, SEGMENT)[None, :]
        if INTEGER:
            a = tl.load(x + m * (segments * SEGMENT) + p, m < rows, other=0)
            w = tl.load(book + code).to(tl.int8) if CODING == "book" else (code - CENTER).to(tl.int8)
            part = tl.dot(a, w, out_dtype=tl.int32)
            if zeros is not None:
                zero = tl.load(zeros + this * TILE_BYTES + ZEROS_AT + slot, inside, other=0).to(tl.int32)
                part += tl.load(row_sums + m * segments + segment, m < rows, other=0) * (CENTER - zero)
            row_scale = tl.load(row_scales + m * segments + segment, m < rows, other=0.0)
            acc += part.to(tl.float32) * (row_scale * scale)
        else:
            k, there = input_of(p, group, padded_group, inputs, PADDED)
            a = tl.load(x + m * x_row + k * x_column, (m < rows) & there, other=0.0).to(ROUND)
            w = value_of(code, book, CODING, CENTER)
            if zeros is not None:
                zero = tl.load(zeros + this * TILE_BYTES + ZEROS_AT + slot, inside, other=0).to(tl.float32)
                w += CENTER - zero
            acc += tl.dot(a, w.to(ROUND), input_precision="ieee") * scale
    _finish(acc * unit, y, bias, other, m, n0, rows, outputs, o_row, o_column, b_stride, EPILOGUE, GATED, BLOCK_M,
            BLOCK_N)  # fmt: skip


@triton.jit
def _vector(x, row_scales, codes, scales, zeros, book, bias, other, y, inputs, group, padded_group, tiles, segments,
            weight_rows, outputs, unit, x_column, o_column, b_stride, INTEGER: tl.constexpr, ROUND: tl.constexpr,
            BITS: tl.constexpr, CODING: tl.constexpr, CENTER: tl.constexpr, E8M0: tl.constexpr, PADDED: tl.constexpr,
            SEGMENT: tl.constexpr, TILE_DWORDS: tl.constexpr, TILE_SCALES: tl.constexpr, SCALES_AT: tl.constexpr,
            TILE_BYTES: tl.constexpr, ZEROS_AT: tl.constexpr, EPILOGUE: tl.constexpr, GATED: tl.constexpr,
            BLOCK_N: tl.constexpr, DWORDS: tl.constexpr):  # fmt: skip
    """One row: a thread decodes the dwords that it read and multiplies them in place; sums over threads come last."""
    PER: tl.constexpr = 32 // BITS
    n0 = tl.program_id(0) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    tile = (n // 32).to(tl.int64) * tiles
    acc = tl.zeros((DWORDS, BLOCK_N), tl.float32)
    for start in range(0, segments * (SEGMENT // PER), DWORDS):
        r = start + tl.arange(0, DWORDS)[:, None]
        segment = r * PER // SEGMENT
        inside = (n < weight_rows) & (segment < segments)
        this = tile + r * PER // 128
        dwords = tl.load(codes + this * TILE_DWORDS + r * PER % 128 // PER * 32 + n % 32, inside, other=0)
        slot = segment * SEGMENT % 128 // SEGMENT * 32 + n % 32
        scale = scale_of(tl.load(scales + this * TILE_SCALES + SCALES_AT + slot, inside, other=0), E8M0)
        shift = 0.0
        if zeros is not None:
            shift = CENTER - tl.load(zeros + this * TILE_BYTES + ZEROS_AT + slot, inside, other=0).to(tl.float32)
        part = tl.zeros((DWORDS, BLOCK_N), tl.float32)
        for i in tl.static_range(PER):
            p = r * PER + i
            if INTEGER:  # products and sums of a dword's few integers are exact in float32 too
                a = tl.load(x + p, segment < segments, other=0).to(tl.float32)
            else:
                k, there = input_of(p, group, padded_group, inputs, PADDED)
                a = tl.load(x + k * x_column, there, other=0.0).to(ROUND).to(tl.float32)
            part += a * (value_of(code_at(dwords, i, BITS), book, CODING, CENTER) + shift)
        if INTEGER:
            scale = scale * tl.load(row_scales + segment, segment < segments, other=0.0)
        acc += part * scale
    total = tl.sum(acc, 0, keep_dims=True) * unit
    m = tl.zeros((1, 1), tl.int64)
    _finish(total, y, bias, other, m, n0, 1, outputs, 0, o_column, b_stride, EPILOGUE, GATED, 1, BLOCK_N)


def _refuses(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, *args: Any, **kw: Any) -> str | None:
    return refuses_double(x, bias) or refuses_weight(weight)


def _rounded(flat: Tensor, packed: Packed, asymmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the rows' codes, scales and sums of codes."""
    rows, device = flat.shape[0], flat.device
    codes = torch.empty((rows, packed.segments * packed.segment), dtype=torch.int8, device=device)
    scales = torch.empty((rows, packed.segments), dtype=torch.float32, device=device)
    sums = torch.empty((rows, packed.segments), dtype=torch.int32, device=device) if asymmetric else None
    launch(
        _round_rows,
        blocks.segments(packed.segment)[:1],
        lambda b: (rows, triton.cdiv(packed.segments, b.sizes["SEGMENTS"])),
        (),
        *(flat, codes, scales, sums, *packed.sizes, packed.segments, *flat.stride()),
        PADDED=packed.constants["PADDED"],
        SEGMENT=packed.segment,
        enable_fp_fusion=False,
    )
    return codes, scales, sums


def _factor_dtype(x: torch.dtype, layout: Layout, compute: str) -> Any:
    """Return what both factors are rounded to: 16 bits where the codes and x lose nothing by it, or compute asks for it."""
    if compute == "bf16":
        return tl.bfloat16
    exact = not layout.format.digits or layout.weight_dtype == "fp4_e2m1"
    if exact and x != torch.float32:
        return tl.bfloat16 if x == torch.bfloat16 else tl.float16
    return tl.float32


@route("triton", "quant_linear", _refuses)
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
    """See `llmrt.ops.quant_linear`."""
    y = ops.quant_linear.empty(x, weight, bias, other, layout, out_features, compute, epilogue)
    if not y.numel():
        return y
    gated, form = epilogue in GATED, Layout.parse(layout)
    weight_rows = 2 * (-(-out_features // 16) * 16) if gated else out_features
    packed = Packed(weight, layout, weight_rows, x.shape[-1], compute)
    flat, m = x.reshape(-1, x.shape[-1]), y.numel() // out_features
    addend = None if other is None else other.reshape(-1, out_features)
    scales = sums = None
    integer, factor = compute == "int8", _factor_dtype(x.dtype, form, compute)
    if integer:
        flat, scales, sums = _rounded(flat, packed, form.asymmetric)
    constants = {"INTEGER": integer, "ROUND": factor, "EPILOGUE": epilogue, "GATED": gated, **packed.constants}
    views = (packed.codes, packed.scales, packed.zeros, packed.book, bias, addend, y)
    sizes = (*packed.sizes, packed.tiles, packed.segments, weight_rows, out_features, 1.0 / packed.digits)
    shape = (m, weight_rows, *x.shape[-1:], x.dtype, layout, compute)
    if m == 1:
        launch(
            _vector,
            blocks.vector(weight_rows, gated),
            lambda b: (triton.cdiv(weight_rows, b.sizes["BLOCK_N"]),),
            shape,
            *(flat, scales, *views, *sizes, flat.stride(1), strides(addend, 2)[1], *strides(bias, 1)),
            **constants,
        )
        return y
    launch(
        _matmul,
        blocks.matmul(m, weight_rows, integer or factor != tl.float32),
        lambda b: (triton.cdiv(m, b.sizes["BLOCK_M"]) * triton.cdiv(weight_rows, b.sizes["BLOCK_N"]),),
        shape,
        *(flat, scales, sums, *views, m, *sizes, *flat.stride(), *strides(addend, 2), *strides(bias, 1)),
        **constants,
    )
    return y
