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
def segment_codes(codes, base, segment, outputs_inside, BITS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_N: tl.constexpr,
                  TILE_DWORDS: tl.constexpr):  # fmt: skip
    """The codes [SEGMENT, BLOCK_N] of one segment; base: [1, BLOCK_N] the first dword of each output."""
    PER: tl.constexpr = 32 // BITS
    first = segment * SEGMENT
    r = (first % 128) // PER + tl.arange(0, SEGMENT // PER)[:, None]
    dwords = tl.load(codes + base + (first // 128) * TILE_DWORDS + r * 32, outputs_inside, other=0)
    i = tl.arange(0, PER)[None, :, None]
    return tl.reshape(code_at(dwords[:, None, :], i, BITS), (SEGMENT, BLOCK_N))


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
