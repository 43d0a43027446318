"""Products of rows with a packed weight, or with that of each row's expert: tiles are dequantized in registers on their way in.

Where blocks of outputs alone would leave most of a GPU idle, programs share the inputs of one block: each writes its sum to memory and a
second kernel adds the sums, always in the same order, before bias and epilogue.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.formats import Layout
from ...ops.linear import GATED
from . import blocks
from .activations import activate, round_even
from .blocks import Blocks
from .decode import Packed, factor_at, factors_sum, input_of, scale_of, segment_codes, segment_integers, value_of
from .launch import launch, strides

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
def finish(acc, y, bias, other, m, alive, n0, outputs, o_row, o_column, b_stride, EPILOGUE: tl.constexpr,
           GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Bias, epilogue and store of acc [BLOCK_M, BLOCK_N], outputs n0 .. of the weight for the rows m [BLOCK_M, 1] that are alive."""
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
    inside = alive & (n < outputs)
    if other is not None:
        v = tl.load(other + m * o_row + n * o_column, inside, other=0.0).to(tl.float32)
        acc = acc + v if EPILOGUE == "add" else acc * v
    tl.store(y + m * outputs + n, acc.to(y.dtype.element_ty), inside)


@triton.jit
def keep(acc, partial, m, alive, n0, rows, weight_rows, BLOCK_N: tl.constexpr):
    """Write the sums of one part of the inputs to partial [parts, M, N]."""
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    at = partial + (tl.program_id(1) * rows + m) * weight_rows + n
    tl.store(at, acc, alive & (n < weight_rows))


@triton.jit
def _join(partial, bias, other, y, rows, weight_rows, outputs, parts, unit, o_row, o_column, b_stride, EPILOGUE: tl.constexpr,
          GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The sum of all parts, in their order, with bias and epilogue."""
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    n0 = tl.program_id(0) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(0, parts):
        acc += tl.load(partial + (part * rows + m) * weight_rows + n, (m < rows) & (n < weight_rows), other=0.0)
    finish(acc * unit, y, bias, other, m, m < rows, n0, outputs, o_row, o_column, b_stride, EPILOGUE, GATED, BLOCK_M,
           BLOCK_N)  # fmt: skip


@triton.jit
def expert_at(chosen, row, experts):
    """The expert of a row, 0 in place of one that does not exist."""
    expert = tl.load(chosen + row).to(tl.int64)
    return tl.where((expert < 0) | (expert >= experts), 0, expert)


@triton.jit
def rows_of_block(order, starts, experts, block, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a block of rows, its rows [BLOCK_M, 1] and which of them there are: each expert has blocks of its own, in order."""
    e = tl.arange(0, EXPERTS)
    begin = tl.load(starts + e, e < experts, other=0).to(tl.int32)
    end = tl.load(starts + e + 1, e < experts, other=0).to(tl.int32)
    count = (end - begin + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(count, 0)
    mine = (last - count <= block) & (block < last)
    first = tl.sum(tl.where(mine, begin + (block - last + count) * BLOCK_M, 0), 0)
    stop = tl.sum(tl.where(mine, end, 0), 0)
    slot = first + tl.arange(0, BLOCK_M)[:, None]
    alive = slot < stop
    return tl.sum(tl.where(mine, e, 0), 0), tl.load(order + slot, alive, other=0).to(tl.int64), alive


@triton.jit
def _matmul(x, row_scales, row_sums, codes, scales, zeros, book, bias, other, y, partial, chosen, order, starts, rows, experts,
            inputs, group, padded_group, tiles, segments, weight_rows, outputs, unit, per_part, x_row, x_column, o_row, o_column,
            b_stride, INTEGER: tl.constexpr, ROUND: tl.constexpr, BITS: tl.constexpr, CODING: tl.constexpr, CENTER: tl.constexpr,
            E8M0: tl.constexpr, PADDED: tl.constexpr, SEGMENT: tl.constexpr, TILE_DWORDS: tl.constexpr, TILE_SCALES: tl.constexpr,
            SCALES_AT: tl.constexpr, TILE_BYTES: tl.constexpr, ZEROS_AT: tl.constexpr, EPILOGUE: tl.constexpr,
            GATED: tl.constexpr, SHARE: tl.constexpr, EXPERTS: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr):  # fmt: skip
    """x [M / SHARE, K] with strides, or with INTEGER its codes [M / SHARE, segments * SEGMENT]; programs of one block of outputs are
    neighbors, so that they share its tiles in the cache. SHARE rows have one of x. Experts: with order and starts, row order[i] has the
    expert e with starts[e] <= i < starts[e + 1]; with chosen, row m has chosen[m] and a block of its own."""
    row_blocks = tl.cdiv(rows, BLOCK_M)
    if starts is not None:
        row_blocks = tl.minimum(rows, rows // BLOCK_M + experts)
    if chosen is not None:
        row_blocks = rows
    block, n0 = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    first_segment = tl.program_id(1) * per_part
    last_segment = tl.minimum(first_segment + per_part, segments)
    tile = (n // 32).to(tl.int64) * tiles
    i = tl.arange(0, BLOCK_M)[:, None]
    if starts is not None:
        expert, m, alive = rows_of_block(order, starts, experts, block, BLOCK_M, EXPERTS)
        tile += expert.to(tl.int64) * ((weight_rows + 31) // 32) * tiles
        last_segment = tl.where(tl.max(alive.to(tl.int32)) > 0, last_segment, first_segment)
    elif chosen is not None:
        m, alive = (block + 0 * i).to(tl.int64), i == 0
        tile += expert_at(chosen, block, experts) * ((weight_rows + 31) // 32) * tiles
    else:
        m = (block * BLOCK_M + i).to(tl.int64)
        alive = m < rows
    source = m // SHARE
    inside = n < weight_rows
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first_segment * (SEGMENT // STEP), last_segment * (SEGMENT // STEP)):
        base = tile * TILE_DWORDS + n % 32
        segment = step * STEP // SEGMENT
        this = tile + segment * SEGMENT // 128
        slot = segment * SEGMENT % 128 // SEGMENT * 32 + n % 32
        scale = scale_of(tl.load(scales + this * TILE_SCALES + SCALES_AT + slot, inside, other=0), E8M0)
        p = step * STEP + tl.arange(0, STEP)[None, :]
        if INTEGER:
            a = tl.load(x + source * (segments * SEGMENT) + p, alive, other=0)
            if CODING == "book":
                code = segment_codes(codes, base, step, inside, BITS, STEP, BLOCK_N, TILE_DWORDS)
                w = tl.load(book + code).to(tl.int8)
            else:
                w = segment_integers(codes, base, step, inside, BITS, STEP, BLOCK_N, TILE_DWORDS)
            part = tl.dot(a, w, out_dtype=tl.int32)
            if zeros is not None:
                zero = tl.load(zeros + this * TILE_BYTES + ZEROS_AT + slot, inside, other=0).to(tl.int32)
                part += tl.load(row_sums + source * segments + segment, alive, other=0) * (CENTER - zero)
            row_scale = tl.load(row_scales + source * segments + segment, alive, other=0.0)
            acc += part.to(tl.float32) * (row_scale * scale)
        else:
            k, there = input_of(p, group, padded_group, inputs, PADDED)
            a = tl.load(x + source * x_row + k * x_column, alive & there, other=0.0).to(ROUND)
            code = segment_codes(codes, base, step, inside, BITS, STEP, BLOCK_N, TILE_DWORDS)
            w = value_of(code, book, CODING, CENTER)
            if zeros is not None:
                zero = tl.load(zeros + this * TILE_BYTES + ZEROS_AT + slot, inside, other=0).to(tl.float32)
                w += CENTER - zero
            acc += tl.dot(a, w.to(ROUND), input_precision="ieee") * scale
    if partial is not None:
        keep(acc, partial, m, alive, n0, rows, weight_rows, BLOCK_N)
    else:
        finish(acc * unit, y, bias, other, m, alive, n0, outputs, o_row, o_column, b_stride, EPILOGUE, GATED, BLOCK_M,
               BLOCK_N)  # fmt: skip


@triton.jit
def _vector(x, row_scales, codes, scales, zeros, book, bias, other, y, partial, chosen, rows, experts, inputs, group, padded_group,
            tiles, segments, weight_rows, outputs, unit, per_part, x_row, x_column, o_row, o_column, b_stride, INTEGER: tl.constexpr,
            ROUND: tl.constexpr, BITS: tl.constexpr, CODING: tl.constexpr, CENTER: tl.constexpr, E8M0: tl.constexpr,
            PADDED: tl.constexpr, SEGMENT: tl.constexpr, TILE_DWORDS: tl.constexpr, TILE_SCALES: tl.constexpr,
            SCALES_AT: tl.constexpr, TILE_BYTES: tl.constexpr, ZEROS_AT: tl.constexpr, EPILOGUE: tl.constexpr,
            GATED: tl.constexpr, SHARE: tl.constexpr, BLOCK_N: tl.constexpr, DWORDS: tl.constexpr):  # fmt: skip
    """One row each: a thread decodes the dwords that it read and multiplies them in place; sums over threads come last."""
    PER: tl.constexpr = 32 // BITS
    n0 = tl.program_id(0) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    tile = (n // 32).to(tl.int64) * tiles
    row = tl.program_id(2).to(tl.int64)
    source = row // SHARE
    if chosen is not None:
        tile += expert_at(chosen, row, experts) * ((weight_rows + 31) // 32) * tiles
    first_segment = tl.program_id(1) * per_part
    last_segment = tl.minimum(first_segment + per_part, segments)
    acc = tl.zeros((DWORDS, BLOCK_N), tl.float32)
    for start in range(first_segment * (SEGMENT // PER), last_segment * (SEGMENT // PER), DWORDS):
        r = start + tl.arange(0, DWORDS)[:, None]
        segment = r * PER // SEGMENT
        inside = (n < weight_rows) & (segment < last_segment)
        this = tile + r * PER // 128
        dwords = tl.load(codes + this * TILE_DWORDS + r * PER % 128 // PER * 32 + n % 32, inside, other=0)
        slot = segment * SEGMENT % 128 // SEGMENT * 32 + n % 32
        scale = scale_of(tl.load(scales + this * TILE_SCALES + SCALES_AT + slot, inside, other=0), E8M0)
        shift = 0.0
        if zeros is not None:
            shift = CENTER - tl.load(zeros + this * TILE_BYTES + ZEROS_AT + slot, inside, other=0).to(tl.float32)
        part, total = tl.zeros((DWORDS, BLOCK_N), tl.float32), tl.zeros((DWORDS, 1), tl.float32)
        for i in tl.static_range(PER):
            p = r * PER + i
            if INTEGER:  # products and sums of a dword's few integers are exact in float32 too
                a = tl.load(x + source * (segments * SEGMENT) + p, segment < last_segment, other=0).to(tl.float32)
            else:
                k, there = input_of(p, group, padded_group, inputs, PADDED)
                there = there & (segment < last_segment)
                a = tl.load(x + source * x_row + k * x_column, there, other=0.0).to(ROUND).to(tl.float32)
            total += a
            part += a * factor_at(dwords, i, book, BITS, CODING)
        part = factors_sum(part, total, shift, BITS, CODING, CENTER)
        if INTEGER:
            scale = scale * tl.load(row_scales + source * segments + segment, segment < last_segment, other=0.0)
        acc += part * scale
    total = tl.sum(acc, 0, keep_dims=True)
    m = tl.full((1, 1), 0, tl.int64) + row
    alive = m < rows
    if partial is not None:
        keep(total, partial, m, alive, n0, rows, weight_rows, BLOCK_N)
    else:
        finish(total * unit, y, bias, other, m, alive, n0, outputs, o_row, o_column, b_stride, EPILOGUE, GATED, 1,
               BLOCK_N)  # fmt: skip


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


@dataclass(frozen=True)
class Chosen:
    """The experts of rows.

    Args:
        experts: int64 [M], the expert of each row; one that does not exist is read as any.
        count: of experts.
        share: rows that have one row of x in common, one after the other.
        order: int64 [M], the rows in the order of their experts; None where every row shall be multiplied alone.
        starts: int64 [count + 1], where each expert's rows start in that order.
    """

    experts: Tensor
    count: int
    share: int
    order: Tensor | None = None
    starts: Tensor | None = None


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    y: Tensor,
    layout: str,
    compute: str,
    epilogue: str,
    chosen: Chosen | None = None,
) -> None:
    """Write what `llmrt.ops.quant_linear` gives to y.

    Args:
        x: [M, K], with `chosen` [M / share, K].
        weight: packed; with `chosen`, of all experts: [E, ...].
        bias: of the weight's rows, or None.
        other: [M, out_features] or None.
        y: [M, out_features], contiguous.
        layout: of the weight.
        compute: see `quant_linear`.
        epilogue: the same.
        chosen: the experts of the rows, or None.
    """
    gated, form, (m, out_features) = epilogue in GATED, Layout.parse(layout), y.shape
    weight_rows = 2 * (-(-out_features // 16) * 16) if gated else out_features
    packed = Packed(weight, layout, weight_rows, x.shape[-1], compute)
    integer, factor = compute == "int8", _factor_dtype(x.dtype, form, compute)
    scales = sums = None
    shape = (m, weight_rows, x.shape[-1], x.dtype, layout, compute, chosen is None)
    if integer:
        x, scales, sums = _rounded(x, packed, form.asymmetric)
    alone = chosen is not None and chosen.order is None
    rows_of_weight = 1 if alone else m if chosen is None else triton.cdiv(m, chosen.count)
    vector = rows_of_weight == 1 and (alone or chosen is None) and not blocks.one_row_by_matrix_units(form, integer)
    if vector:
        choices = blocks.vector(weight_rows, gated)
    else:
        sixteen_bits = integer or factor != tl.float32
        crowded = chosen is not None or packed.book is not None
        choices = blocks.matmul(rows_of_weight, weight_rows, sixteen_bits, crowded)

    def programs(b: Blocks) -> int:
        size = 1 if alone else b.sizes.get("BLOCK_M", 1)
        row_blocks = triton.cdiv(m, size) if alone or chosen is None else min(m, m // size + chosen.count)
        return row_blocks * triton.cdiv(weight_rows, b.sizes["BLOCK_N"])

    wanted = blocks.parts(programs(choices[0]), rows_of_weight, packed.sizes[0], form.format.bits)
    parts, per_part = blocks.shared(packed.segments, wanted)
    partial = torch.empty((parts, m, weight_rows), dtype=torch.float32, device=x.device) if parts > 1 else None
    places = (*strides(other, 2), *strides(bias, 1))
    unit, epilogues = 1.0 / packed.digits, {"EPILOGUE": epilogue, "GATED": gated}
    constants = {"INTEGER": integer, "ROUND": factor, "SHARE": 1 if chosen is None else chosen.share}
    constants |= epilogues | packed.constants
    views = (packed.codes, packed.scales, packed.zeros, packed.book, bias, other, y, partial)
    experts = chosen.experts if alone and chosen is not None else None
    count = 0 if chosen is None else chosen.count
    sizes = (m, count, *packed.sizes, packed.tiles, packed.segments, weight_rows, out_features, unit, per_part)
    if vector:
        launch(
            _vector,
            choices,
            lambda b: (triton.cdiv(weight_rows, b.sizes["BLOCK_N"]), parts, m),
            shape,
            *(x, scales, *views, experts, *sizes, *x.stride(), *places),
            **constants,
        )
    else:
        order, starts = (None, None) if chosen is None else (chosen.order, chosen.starts)
        launch(
            _matmul,
            choices,
            lambda b: (programs(b), parts),
            shape,
            *(x, scales, sums, *views, experts, order, starts, *sizes, *x.stride(), *places),
            EXPERTS=blocks.power(count),
            STEP=packed.segment if integer or factor != tl.float32 else 32,  # float32 has all of a step in registers
            **constants,
        )
    if partial is not None:
        launch(
            _join,
            blocks.joins(m),
            lambda b: (triton.cdiv(weight_rows, b.sizes["BLOCK_N"]), triton.cdiv(m, b.sizes["BLOCK_M"])),
            (),
            *(partial, bias, other, y, m, weight_rows, out_features, parts, unit, *places),
            **epilogues,
        )
