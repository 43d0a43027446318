"""The table of weight formats: what the codes of a quantized weight mean, and how a packed weight is laid out.

A row says how many bits a code has and where its zero is; quantization, dequantization and the packed tile follow from
it. To add a format, add a row here and its decode in csrc/linear_decode.h; tests and benchmarks iterate `FORMATS`.

Canonical tensors of one weight [N, K] (device-independent, the ones that are saved):

- codes: uint8 [N, ceil(K * bits / 8)], unsigned; 4-bit codes two to a byte, low nibble = even k.
- scales: [N, G] float32, bfloat16 or float16, G = ceil(K / group size); the last group may be shorter.
- zeros: uint8 [N, G] when asymmetric. A symmetric format has one constant zero.

value = (code - zero) * scale.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .check import check, check_dtype, check_shape

TILE_N, TILE_K = 32, 128
SCALE_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_SCALE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Args:
        name: as users write it.
        bits: of one code.
        zero: the code of the value 0 when symmetric.
        sym_max: largest magnitude of (code - zero) that symmetric quantization maps absmax to.
    """

    name: str
    bits: int
    zero: int
    sym_max: int

    @property
    def levels(self) -> int:
        """Number of the largest code."""
        return (1 << self.bits) - 1


FORMATS = {row.name: row for row in (Format("int4", 4, 8, 7), Format("int8", 8, 128, 127))}


@dataclass(frozen=True)
class Layout:
    """Format, scheme, group size and scale dtype of a weight; its text, such as ``int4_sym_g128_bf16``, goes into graphs.

    Args:
        weight_dtype: a name in `FORMATS`.
        asymmetric: whether every group has a zero of its own.
        group_size: input features that share a scale, at least 8; -1 for the whole row.
        scale_dtype: float32, bfloat16 or float16.

    Raises:
        RuntimeError: for a value outside these.
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
        check(self.scale_dtype in _SCALE_NAMES, f"scale_dtype is {self.scale_dtype}; valid: float32, bfloat16, float16")

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
            RuntimeError: the text is not of the form ``<format>_<sym|asym>_<gN|channel>_<f32|bf16|f16>``.
        """
        match = re.fullmatch(r"([a-z0-9]+)_(sym|asym)_(g\d{1,7}|channel)_(f32|bf16|f16)", text)
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
    check(in_features >= 1, f"in_features is {in_features}; valid: at least 1")
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

    Symmetric: scale = absmax / 7 or / 127; with `fullrange`, the signed value of largest magnitude / -8 or / -128, so that
    every code is used. Asymmetric: scale = (max - min) / 15 or / 255, zero = round(-min / scale), where min and max
    include 0. Codes are computed with the scale as stored.

    Args:
        weight: [N, K], any floating dtype, finite.
        layout: the format.
        fullrange: see above; symmetric only.

    Returns:
        (codes uint8 [N, ceil(K * bits / 8)], scales [N, G], zeros uint8 [N, G] or None).

    Raises:
        RuntimeError: weight is not a finite floating matrix.
    """
    check(
        weight.dim() == 2 and weight.is_floating_point(),
        f"weight is {weight.dtype} {list(weight.shape)}; expected floating [N, K]",
    )
    n, k = weight.shape
    sizes, row = layout.geometry(k), layout.format
    w = weight.float()
    check(bool(torch.isfinite(w).all()), "weight has NaN or infinite values")
    if sizes.groups * sizes.group != k:
        w = torch.nn.functional.pad(w, (0, sizes.groups * sizes.group - k))
    w = w.view(n, sizes.groups, sizes.group)
    zeros = None
    if layout.asymmetric:
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        scales = ((high - low) / row.levels).to(layout.scale_dtype)
        zero = torch.nan_to_num(torch.round(-low / scales.float()), 0.0, row.levels, 0.0).clamp(0, row.levels)
        zeros = zero.to(torch.uint8)
    elif fullrange:
        extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scales, zero = (extreme / -row.zero).to(layout.scale_dtype), torch.tensor(float(row.zero))
    else:
        scales, zero = (w.abs().amax(-1) / row.sym_max).to(layout.scale_dtype), torch.tensor(float(row.zero))
    inverse = torch.where(
        scales == 0, 0.0, 1.0 / scales.float()
    )  # a group of zeros, or one too small for its scale's dtype
    w = w * inverse.nan_to_num(0.0, 0.0, 0.0).unsqueeze(-1)
    codes = w.round_().add_(zero.unsqueeze(-1)).clamp_(0, row.levels).to(torch.uint8)
    return join_codes(codes.flatten(1)[:, :k], row.bits), scales, zeros


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, layout: Layout, in_features: int) -> Tensor:
    """Return the float32 weight [N, K] (float64 when the scales are)."""
    row, sizes = layout.format, layout.geometry(in_features)
    scales = scales if scales.dtype == torch.float64 else scales.float()
    zero = torch.full_like(scales, row.zero) if zeros is None else zeros.to(scales.dtype)
    spread = [t.repeat_interleave(sizes.group, -1)[:, :in_features] for t in (scales, zero)]
    return (split_codes(codes, row.bits, in_features).to(scales.dtype) - spread[1]) * spread[0]


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
