"""Reading the tiles of a packed weight (ops/linear.py `pack_weight`) in a kernel: dwords of 4 bytes per output, codes, scales.

A tile's codes are dwords [16 (4 bit) or 32 (8 bit)][32 outputs]: dword (r, n) holds the codes of output n for 8 or 4 adjacent inputs, so
threads that own adjacent outputs read adjacent dwords.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.formats import TILE_K, TILE_N, Layout

# mypy: disable-error-code="no-untyped-def"


@triton.jit
def code_at(dwords, i, BITS: tl.constexpr):
    """The codes of input i of each dword, as int32."""
    return (dwords >> (8 * (i % 4) + 4 * (i // 4))) & 15 if BITS == 4 else (dwords >> (8 * i)) & 255


@triton.jit
def value_of(code, book, CODING: tl.constexpr, CENTER: tl.constexpr):
    """What codes stand for in float32: code - CENTER, the book's entry, or the float of 8 bits (exact, subnormal ones included)."""
    if CODING == "book":
        value = tl.load(book + code).to(tl.float32)
    elif CODING == "e5m2":
        value = (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif CODING == "e4m3":  # a float16 has the same mantissa bits on top, and exponents larger by 8
        half = ((code & 127) << 7) | ((code & 128) << 8)
        value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        value = (code - CENTER).to(tl.float32)
    return value


@triton.jit
def factor_at(dwords, i, book, BITS: tl.constexpr, CODING: tl.constexpr):
    """What is multiplied for the codes of input i: of 4-bit integers 1 + code / 16, which is two operations on bits, else their values."""
    if CODING == "integer" and BITS == 4:
        at = 8 * (i % 4) + 4 * (i // 4)  # to the highest bits of a float's fraction
        moved = dwords << (19 - at) if at <= 19 else dwords >> (at - 19)
        factor = ((moved & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True)
    else:
        factor = value_of(code_at(dwords, i, BITS), book, CODING, 0)
    return factor


@triton.jit
def factors_sum(part, total, shift, BITS: tl.constexpr, CODING: tl.constexpr, CENTER: tl.constexpr):
    """The sum of a * (value + shift) from that of a * `factor_at` (part) and that of a (total)."""
    if CODING == "integer" and BITS == 4:
        part = 16.0 * part + total * (shift - (CENTER + 16))
    elif CODING == "integer":
        part += total * (shift - CENTER)
    return part


@triton.jit
def scale_of(stored, E8M0: tl.constexpr):
    """Scales in float32; those of e8m0 are exponents."""
    if E8M0:
        e = stored.to(tl.int32)
        scale = tl.where(e == 0, 0x400000, e << 23).to(tl.float32, bitcast=True)
    else:
        scale = stored.to(tl.float32)
    return scale


@triton.jit
def input_of(p, group, padded_group, inputs, PADDED: tl.constexpr):
    """The inputs that stand at positions p of the packed weight, and whether there are any."""
    if PADDED:
        g = p // padded_group
        o = p - g * padded_group
        k, there = g * group + o, o < group
        there = there & (k < inputs)
    else:
        k, there = p, p < inputs
    return k, there


@triton.jit
def segment_dwords(
    codes, base, segment, outputs_inside, BITS: tl.constexpr, SEGMENT: tl.constexpr, TILE_DWORDS: tl.constexpr
):
    """The dwords [BLOCK_N, SEGMENT / codes of a dword] of one segment; base: [1, BLOCK_N] the first dword of each output."""
    PER: tl.constexpr = 32 // BITS
    first = segment * SEGMENT
    r = (first % 128) // PER + tl.arange(0, SEGMENT // PER)[None, :]
    at = tl.trans(base + (first // 128) * TILE_DWORDS) + r * 32
    return tl.load(codes + at, tl.trans(outputs_inside), other=0)


@triton.jit
def _two(dwords, i, j, BITS: tl.constexpr):
    return tl.join(code_at(dwords, i, BITS), code_at(dwords, j, BITS))


@triton.jit
def segment_codes(codes, base, segment, outputs_inside, BITS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_N: tl.constexpr,
                  TILE_DWORDS: tl.constexpr):  # fmt: skip
    """The codes [SEGMENT, BLOCK_N] of one segment as int32. Joined, those of one dword stay in one thread as neighbors along the inputs, so
    that they go to where matrix units read them in whole words."""
    dwords = segment_dwords(codes, base, segment, outputs_inside, BITS, SEGMENT, TILE_DWORDS)
    if BITS == 4:
        even = tl.join(_two(dwords, 0, 4, BITS), _two(dwords, 2, 6, BITS))
        odd = tl.join(_two(dwords, 1, 5, BITS), _two(dwords, 3, 7, BITS))
    else:
        even, odd = _two(dwords, 0, 2, BITS), _two(dwords, 1, 3, BITS)
    return tl.trans(tl.reshape(tl.join(even, odd), (BLOCK_N, SEGMENT)))


@triton.jit
def _bytes(dwords):
    """The four bytes of each dword in a new last dimension."""
    even = tl.join(dwords.to(tl.int8), (dwords >> 16).to(tl.int8))
    odd = tl.join((dwords >> 8).to(tl.int8), (dwords >> 24).to(tl.int8))
    return tl.join(even, odd)


@triton.jit
def segment_integers(codes, base, segment, outputs_inside, BITS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_N: tl.constexpr,
                     TILE_DWORDS: tl.constexpr):  # fmt: skip
    """The codes [SEGMENT, BLOCK_N] of one segment less 8 (4 bit) or 128 (8 bit) as int8, four at once."""
    dwords = segment_dwords(codes, base, segment, outputs_inside, BITS, SEGMENT, TILE_DWORDS)
    if BITS == 4:  # a byte's highest bit is set so that subtracting does not borrow from its neighbor, and flipped back
        low, high = dwords & 0x0F0F0F0F, (dwords >> 4) & 0x0F0F0F0F
        low, high = (low | -0x7F7F7F80) - 0x08080808, (high | -0x7F7F7F80) - 0x08080808
        parts = tl.join(low ^ -0x7F7F7F80, high ^ -0x7F7F7F80)
    else:
        parts = dwords ^ -0x7F7F7F80
    return tl.trans(tl.reshape(_bytes(parts), (BLOCK_N, SEGMENT)))


class Packed:
    """A packed weight as kernels take it: views of its bytes, sizes, and compile-time constants."""

    def __init__(self, weight: Tensor, layout: str, rows: int, in_features: int, compute: str) -> None:
        """See `llmrt.ops.quant_linear`; rows: of the weight, in_features: K."""
        form = Layout.parse(layout)
        sizes, row = form.geometry(in_features), form.format
        e8m0 = form.scale_dtype == torch.float8_e8m0fnu
        scale_bytes = form.scale_dtype.itemsize
        self.codes = weight.view(torch.int32)
        self.scales = weight if e8m0 else weight.view(form.scale_dtype)
        self.zeros = weight if form.asymmetric else None
        self.book = _book(layout, compute, weight.device) if row.book else None
        self.digits = row.digits if compute == "int8" and row.book else 1
        self.tiles = sizes.tiles
        self.segments = sizes.groups * sizes.padded_group // sizes.segment
        self.sizes = (in_features, sizes.group, sizes.padded_group)
        self.segment, self.rows = sizes.segment, rows
        self.constants: dict[str, Any] = {
            "BITS": row.bits,
            "CODING": "book" if row.book else "integer" if row.integer else layout.split("_")[1],
            "CENTER": row.zero,
            "E8M0": e8m0,
            "PADDED": sizes.groups > 1 and sizes.group != sizes.padded_group,
            "SEGMENT": sizes.segment,
            "TILE_DWORDS": sizes.tile_bytes // 4,
            "TILE_SCALES": sizes.tile_bytes // scale_bytes,
            "SCALES_AT": sizes.code_bytes // scale_bytes,
            "TILE_BYTES": sizes.tile_bytes,
            "ZEROS_AT": sizes.code_bytes + sizes.scale_bytes,
        }


_books: dict[tuple[str, bool | str, torch.device], Tensor] = {}


def _book(layout: str, compute: str, device: torch.device) -> Tensor:
    """Return the values of a look-up's codes as a compute has them, for int8 the integers."""
    row = Layout.parse(layout).format
    key = (row.name, compute, device)
    if key not in _books:
        values = row.values(compute)
        _books[key] = (torch.round(values * row.digits) if compute == "int8" else values).to(device)
    return _books[key]


def refuses_weight(weight: Tensor, name: str = "weight") -> str | None:
    """Say why the kernels cannot read a packed weight."""
    if not weight.is_contiguous() or weight.storage_offset() % 4:
        return f"{name} is not contiguous or starts at no multiple of 4 bytes"
    return None


assert (TILE_N, TILE_K) == (32, 128)
