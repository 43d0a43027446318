"""The table of weight formats: what the codes of a quantized weight mean, and how a packed weight is laid out.

A row says how many bits a code has and what it stands for: an integer, a number of a look-up table, or a float of 8 bits.
Quantization, dequantization and the packed tile follow from it. To add a format, add a row here and in csrc/layout.h, for a new
kind of code also its decode in csrc/linear_decode.h; tests and benchmarks iterate `FORMATS`.

Canonical tensors of one weight [N, K] (device-independent, the ones that are saved):

- codes: uint8 [N, ceil(K * bits / 8)]; 4-bit codes two to a byte, low nibble = even k. Floats of 8 bits are their bytes.
- scales: [N, G] float32, bfloat16 or float16, for floats of 8 bits also float8_e8m0fnu (powers of two), G = ceil(K / group size);
  the last group may be shorter.
- zeros: uint8 [N, G] when asymmetric. A symmetric format has one constant zero.

value = (code - zero) * scale for integers, meaning of the code * scale for the others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .check import check, check_dtype, check_shape

TILE_N, TILE_K = 32, 128
MOST_FEATURES = (1 << 31) - 1
SCALE_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "e8m0": torch.float8_e8m0fnu}
COMPUTES = ("int8", "bf16", "fp16", "fp32")
_SCALE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


@dataclass(frozen=True)
class Format:
    """One row of the table: integers (`zero`), a look-up table (`book`, `digits`) or floats of 8 bits (`dtype`).

    Args:
        name: as users write it.
        bits: of one code.
        absmax: what quantization maps the largest magnitude of a group to.
        zero: of integers, the code of the value 0 when symmetric.
        book: of a look-up, the values of the codes.
        digits: of a look-up, compute int8 multiplies by round(digits * value) / digits; exact where digits * value are integers.
        dtype: of floats, torch's name of their bytes.
    """

    name: str
    bits: int
    absmax: float
    zero: int = 0
    book: tuple[float, ...] = ()
    digits: int = 0
    dtype: torch.dtype | None = None

    @property
    def integer(self) -> bool:
        """Whether codes are integers, which may be asymmetric."""
        return not self.book and self.dtype is None

    @property
    def levels(self) -> int:
        """Number of the largest code."""
        return (1 << self.bits) - 1

    @property
    def computes(self) -> tuple[str, ...]:
        """The computes of `quant_linear` that exist; integers of 8 bits cannot hold the products of floats."""
        return COMPUTES if self.dtype is None else COMPUTES[1:]

    @property
    def scale_names(self) -> tuple[str, ...]:
        """The names of the scale dtypes that exist."""
        return tuple(SCALE_DTYPES) if self.dtype is not None else tuple(name for name in SCALE_DTYPES if name != "e8m0")

    def values(self, compute: str = "fp32") -> Tensor:
        """Return the values of a look-up's codes, float32 [16], as a compute has them.

        "fp32" and "fp16" have the book itself, "bf16" its values rounded to bfloat16, "int8" round(digits * value) / digits. Those of
        fp4_e2m1 are the same in all of them. Those of nf4 move by at most 0.002 in bfloat16 and 0.004 as integers, where the book's
        steps are 0.08 and wider.
        """
        book = torch.tensor(self.book)
        if compute == "int8":
            return torch.round(book * self.digits) / self.digits
        return book.bfloat16().float() if compute == "bf16" else book


#: Quantiles of the normal distribution that have an exact zero: Dettmers et al. 2023 (QLoRA), appendix E.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
#: One sign bit, two of exponent, one of mantissa (Open Compute Project, Microscaling Formats 1.0, section 5.3.3).
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

FORMATS = {
    row.name: row
    for row in (
        Format("int4", 4, 7, zero=8),
        Format("int8", 8, 127, zero=128),
        Format("nf4", 4, 1, book=_NF4, digits=127),
        Format("fp4_e2m1", 4, 6, book=_FP4, digits=2),
        Format("fp8_e4m3", 8, 448, dtype=torch.float8_e4m3fn),
        Format("fp8_e5m2", 8, 57344, dtype=torch.float8_e5m2),
    )
}


def combinations() -> str:
    """Return the combinations of format, scheme, scale dtype and compute that exist, one line for each format."""
    return "\n".join(
        f"  {row.name}: {'sym, asym' if row.integer else 'sym'}; scales {', '.join(row.scale_names)}; "
        f"compute {', '.join(row.computes)}"
        for row in FORMATS.values()
    )


@dataclass(frozen=True)
class Layout:
    """Format, scheme, group size and scale dtype of a weight; its text, such as ``int4_sym_g128_bf16``, goes into graphs.

    Args:
        weight_dtype: a name in `FORMATS`.
        asymmetric: whether every group has a zero of its own; integers only.
        group_size: input features that share a scale, at least 8; -1 for the whole row.
        scale_dtype: float32, bfloat16 or float16; of floats of 8 bits also float8_e8m0fnu.

    Raises:
        RuntimeError: for a value outside these, or a combination that does not exist.
    """

    weight_dtype: str = "int4"
    asymmetric: bool = False
    group_size: int = 128
    scale_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        """Check the fields."""
        check(self.weight_dtype in FORMATS, f"weight_dtype is {self.weight_dtype!r}; valid: {', '.join(FORMATS)}")
        check(
            isinstance(self.group_size, int) and (self.group_size == -1 or 8 <= self.group_size <= 1 << 20),
            f"group_size is {self.group_size!r}; valid: -1 (one group per row) or 8 and more (32, 64, 128 are fastest)",
        )
        names = self.format.scale_names
        check(
            _SCALE_NAMES.get(self.scale_dtype) in names,
            f"scale_dtype is {self.scale_dtype} for {self.weight_dtype}; "
            f"valid: {', '.join(str(SCALE_DTYPES[name])[6:] for name in names)}",
        )
        check(
            self.format.integer or not self.asymmetric,
            f"asymmetric is True for {self.weight_dtype}; valid: False (integers only have a zero per group)",
        )

    def __str__(self) -> str:
        """Return the text form, as the operators take it."""
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        scheme = "asym" if self.asymmetric else "sym"
        return f"{self.weight_dtype}_{scheme}_{group}_{_SCALE_NAMES[self.scale_dtype]}"

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(text: str) -> Layout:
        """Return the layout of a text form.

        Raises:
            RuntimeError: the text is not of the form ``<format>_<sym|asym>_<gN|channel>_<f32|bf16|f16|e8m0>``.
        """
        match = re.fullmatch(r"([a-z0-9_]+)_(sym|asym)_(g\d{1,7}|channel)_(f32|bf16|f16|e8m0)", text)
        if match is None:
            raise RuntimeError(f"layout is {text!r}; expected the form int4_sym_g128_bf16 or int8_asym_channel_f32")
        group = -1 if match[3] == "channel" else int(match[3][1:])
        return Layout(match[1], match[2] == "asym", group, SCALE_DTYPES[match[4]])

    @property
    def format(self) -> Format:
        """The format's row."""
        return FORMATS[self.weight_dtype]

    def geometry(self, in_features: int) -> Geometry:
        """Return the sizes of a packed weight with K = in_features."""
        return _geometry(self, int(in_features))


@dataclass(frozen=True)
class Geometry:
    """Sizes of a packed weight: tiles of 32 outputs x 128 padded inputs, one scale per output and segment of a tile.

    A group of any size is padded to a multiple of its segment (32, 64 or 128 inputs), so that no segment has two scales.

    Args:
        group: input features per group (K when the row is one group).
        groups: G.
        padded_group: input positions that a group takes.
        segment: positions that share a scale in the packed tile.
        tiles: tiles along the inputs.
        code_bytes: of one tile, at its start: rows of 64 bytes = 16 outputs x one dword.
        scale_bytes: of one tile, [segments][32], behind the codes; then the zeros, uint8 [segments][32], if asymmetric.
        tile_bytes: of one tile, a multiple of 64.
    """

    group: int
    groups: int
    padded_group: int
    segment: int
    tiles: int
    code_bytes: int
    scale_bytes: int
    tile_bytes: int

    @property
    def segments(self) -> int:
        """Segments of one tile."""
        return TILE_K // self.segment


@lru_cache(maxsize=4096)
def _geometry(layout: Layout, in_features: int) -> Geometry:
    check(1 <= in_features <= MOST_FEATURES, f"in_features is {in_features}; valid: 1 to {MOST_FEATURES}")
    group = in_features if layout.group_size == -1 else min(layout.group_size, in_features)
    groups = -(-in_features // group)
    unit = TILE_K if groups == 1 else 32
    padded = -(-group // unit) * unit
    segment = next(s for s in (128, 64, 32) if padded % s == 0)
    tiles = -(-groups * padded // TILE_K)
    segments = TILE_K // segment
    code_bytes = TILE_N * TILE_K * layout.format.bits // 8
    scale_bytes = segments * TILE_N * layout.scale_dtype.itemsize
    total = code_bytes + scale_bytes + (segments * TILE_N if layout.asymmetric else 0)
    return Geometry(group, groups, padded, segment, tiles, code_bytes, scale_bytes, -(-total // 64) * 64)


def quantize(weight: Tensor, layout: Layout, fullrange: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize by rounding to nearest.

    Symmetric integers: scale = absmax / 7 or / 127; with `fullrange`, the signed value of largest magnitude / -8 or / -128, so
    that every code is used. Asymmetric: scale = (max - min) / 15 or / 255, zero = round(-min / scale), where min and max
    include 0. nf4: absmax; fp4_e2m1: absmax / 6; fp8_e4m3: absmax / 448; fp8_e5m2: absmax / 57344. A scale of float8_e8m0fnu is the
    next power of two that is not smaller. Codes are computed with the scale as stored: of a look-up the nearest value's (of two
    equally near ones the lower), of floats as torch rounds, to nearest even.

    Args:
        weight: [N, K], any floating dtype, finite.
        layout: the format.
        fullrange: see above; symmetric integers only.

    Returns:
        (codes uint8 [N, ceil(K * bits / 8)], scales [N, G], zeros uint8 [N, G] or None).

    Raises:
        RuntimeError: weight is not a finite floating matrix, or fullrange is True for another format.
    """
    check(
        weight.dim() == 2 and weight.is_floating_point(),
        f"weight is {weight.dtype} {list(weight.shape)}; expected floating [N, K]",
    )
    check_fullrange(fullrange, layout)
    n, k = weight.shape
    sizes, row = layout.geometry(k), layout.format
    w = weight.float()
    check(bool(torch.isfinite(w).all()), "weight has NaN or infinite values")
    if sizes.groups * sizes.group != k:
        w = torch.nn.functional.pad(w, (0, sizes.groups * sizes.group - k))
    w = w.view(n, sizes.groups, sizes.group)
    zeros, zero = None, torch.tensor(float(row.zero))
    if layout.asymmetric:
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        scales = round_scales((high - low) / row.levels, layout.scale_dtype)
        zero = torch.nan_to_num(torch.round(-low / scales.float()), 0.0, row.levels, 0.0).clamp(0, row.levels)
        zeros = zero.to(torch.uint8)
    elif fullrange:
        extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scales = round_scales(extreme / -row.zero, layout.scale_dtype)
    else:
        scales = round_scales(w.abs().amax(-1) / row.absmax, layout.scale_dtype)
    stored = scales.float()
    # 0 for a group of zeros, or one too small for its scale's dtype
    inverse = torch.where(stored == 0, 0.0, 1.0 / stored).nan_to_num(0.0, 0.0, 0.0)
    codes = _codes(w * inverse.unsqueeze(-1), row, zero.unsqueeze(-1))
    return join_codes(codes.flatten(1)[:, :k], row.bits), scales, zeros


def check_fullrange(fullrange: bool, layout: Layout) -> None:
    """Raise RuntimeError if a layout that is not of symmetric integers shall use its full range."""
    valid = layout.format.integer and not layout.asymmetric
    check(valid or not fullrange, f"fullrange is True for the layout {layout}; valid for symmetric integers only")


def round_scales(ideal: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 scales as stored: rounded to nearest even, for float8_e8m0fnu up to a power of two (2^-127 for 0)."""
    if dtype != torch.float8_e8m0fnu:
        return ideal.to(dtype)
    bits = ideal.view(torch.int32)
    exponent = (bits >> 23) + (bits & 0x7FFFFF != 0)
    return exponent.clamp(max=254).to(torch.uint8).view(dtype)


def _codes(w: Tensor, row: Format, zero: Tensor) -> Tensor:
    """Return the codes, one to a byte, of a weight in units of its scales."""
    if row.dtype is not None:
        return w.clamp(-row.absmax, row.absmax).to(row.dtype).view(torch.uint8)
    if row.book:
        thresholds, codes = thresholds_of(row)
        return torch.tensor(codes, dtype=torch.uint8)[torch.bucketize(w, torch.tensor(thresholds))]
    return w.round().add_(zero).clamp_(0, row.levels).to(torch.uint8)


@lru_cache
def thresholds_of(row: Format) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return a book's midpoints, rising, and the codes between them: codes[i] stands for values above i midpoints."""
    book = torch.tensor(row.book)
    codes = [int(c) for c in book.argsort(stable=True) if int(c) == row.book.index(row.book[int(c)])]  # one zero of two
    values = book[codes]
    return tuple(((values[1:] + values[:-1]) / 2).tolist()), tuple(codes)


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, layout: Layout, in_features: int, compute: str = "fp32"
) -> Tensor:
    """Return the float32 weight [N, K] (float64 when the scales are), its look-up as `compute` has it (`Format.values`)."""
    row, sizes = layout.format, layout.geometry(in_features)
    scales = scales if scales.dtype == torch.float64 else scales.float()
    spread = scales.repeat_interleave(sizes.group, -1)[:, :in_features]
    codes = split_codes(codes, row.bits, in_features)
    if row.dtype is not None:
        return codes.contiguous().view(row.dtype).to(scales.dtype) * spread
    if row.book:
        return row.values(compute).to(codes.device, scales.dtype)[codes.int()] * spread
    zero = torch.full_like(scales, row.zero) if zeros is None else zeros.to(scales.dtype)
    return (codes.to(scales.dtype) - zero.repeat_interleave(sizes.group, -1)[:, :in_features]) * spread


def join_codes(codes: Tensor, bits: int) -> Tensor:
    """Return [N, K] uint8 codes packed to [N, ceil(K * bits / 8)], low nibble first."""
    if bits == 8:
        return codes.contiguous()
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def split_codes(codes: Tensor, bits: int, in_features: int) -> Tensor:
    """Return the codes one to a byte, [N, K]."""
    if bits == 8:
        return codes
    return torch.stack((codes & 15, codes >> 4), -1).view(codes.shape[0], -1)[:, :in_features]


def interleave_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """Return rows of `gate` and `up` ([I, ...] each) 16 by 16 in turn, the last 16 padded with zeros: [2 * ceil16(I), ...].

    A tile of 32 outputs then holds 16 gates and their 16 ups, and act(gate) * up happens in registers.
    """
    check(gate.shape == up.shape, f"up has shape {list(up.shape)}; expected that of gate, {list(gate.shape)}")
    rows, rest = gate.shape[0], gate.shape[1:]
    padded = -(-rows // 16) * 16
    both = gate.new_zeros((padded // 16, 2, 16, *rest))
    for i, part in enumerate((gate, up)):
        if padded != rows:
            part = torch.cat((part, part.new_zeros((padded - rows, *rest))))
        both[:, i] = part.view(-1, 16, *rest)
    return both.view(2 * padded, *rest)


def split_gate_up(both: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Undo `interleave_gate_up`: return (gate, up), [rows, ...] each."""
    parts = both.view(-1, 2, 16, *both.shape[1:])
    return tuple(parts[:, i].reshape(-1, *both.shape[1:])[:rows] for i in (0, 1))  # type: ignore[return-value]


def check_canonical(codes: Tensor, scales: Tensor, zeros: Tensor | None, layout: Layout, in_features: int) -> Geometry:
    """Raise RuntimeError unless the tensors are a weight of this layout; return its geometry."""
    sizes, row = layout.geometry(in_features), layout.format
    check_dtype(codes, torch.uint8, "codes")
    check_shape(codes, (-1, -(-in_features * row.bits // 8)), "codes")
    check_shape(scales, (codes.shape[0], sizes.groups), "scales")
    check_dtype(scales, layout.scale_dtype, "scales")
    check(
        (zeros is not None) == layout.asymmetric, f"zeros {'missing' if zeros is None else 'given'} for layout {layout}"
    )
    if zeros is not None:
        check_dtype(zeros, torch.uint8, "zeros")
        check_shape(zeros, (codes.shape[0], sizes.groups), "zeros")
    return sizes


def check_finite(codes: Tensor, scales: Tensor, layout: Layout) -> None:
    """Raise RuntimeError if a scale or a code of floats is NaN or infinite."""
    check(bool(torch.isfinite(scales.float()).all()), "scales has NaN or infinite values")
    if layout.format.dtype is not None:
        values = codes.contiguous().view(layout.format.dtype).float()
        check(bool(torch.isfinite(values).all()), f"codes has NaN or infinite values of {layout.weight_dtype}")
