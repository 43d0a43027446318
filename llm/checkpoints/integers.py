"""Integer weights as foreign checkpoints mean them, (code - zero) * scale, put into the layouts of ops/formats.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.formats import Layout, join_codes
from ..linear import Canonical
from .entries import expect_finite
from .fields import canonical_codes, unpack_fields
from .reader import Weight


def groups_of(in_features: int, group_size: int) -> int:
    """Return G: -1 and sizes from K on are one group; the last group may be shorter."""
    return 1 if group_size == -1 else -(-in_features // min(group_size, in_features))


def integer_layout(name: str, bits: int, asymmetric: bool, group_size: int, scales: torch.dtype, k: int) -> Layout:
    """Return the layout of a weight: int4 up to 4 bits, else int8; sizes from K on are -1.

    Raises:
        ValueError: there is none; the message names the linear.
    """
    group = -1 if group_size >= k else group_size
    try:
        return Layout("int4" if bits <= 4 else "int8", asymmetric, group, scales)
    except RuntimeError as error:
        raise ValueError(f"{name}: {error}") from None


def packed_weight(
    name: str,
    packed: Tensor,
    bits: int,
    in_features: int,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    perm: Tensor | None = None,
    bias: Tensor | None = None,
) -> Weight:
    """Return the weight of bit fields that lie along the inputs.

    Codes of less than 4 bits are moved so that their zero is that of int4, 8, which is exact: the weight is symmetric then.

    Args:
        name: of the linear, for errors.
        packed: [N, W] integers, see fields.py.
        bits: 2, 3, 4 or 8.
        in_features: K.
        scales: [N, G], finite.
        zeros: integers [N, G], None for 2 ** (bits - 1) everywhere.
        group_size: input features, or -1.
        perm: int32 [K] or None; applied to the columns here.
        bias: [N] or None.
    """
    if perm is None and bits >= 4:
        codes = canonical_codes(packed, bits, in_features)
        return coded_weight(name, codes, bits, in_features, scales, zeros, group_size, None, bias)
    fields = unpack_fields(packed, bits, in_features)
    if perm is not None:
        fields = fields.index_select(1, perm.long())
    if bits < 4:
        shift = torch.full_like(scales, 8 - (1 << (bits - 1)), dtype=torch.uint8)
        if zeros is not None:
            _expect_range(name, zeros, 8)
            shift = (8 - zeros).to(torch.uint8)
        group = in_features if group_size == -1 else min(group_size, in_features)
        fields = fields + shift.repeat_interleave(group, 1)[:, :in_features]
        zeros = None
    codes = join_codes(fields, 4 if bits <= 4 else 8)
    return coded_weight(name, codes, bits, in_features, scales, zeros, group_size, perm, bias)


def coded_weight(
    name: str,
    codes: Tensor,
    bits: int,
    in_features: int,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    perm: Tensor | None = None,
    bias: Tensor | None = None,
) -> Weight:
    """Return the weight of canonical codes; symmetric, which is faster, when all zeros are the symmetric one.

    Args: as of `packed_weight`, but for codes: those of int4 (bits <= 4) or int8, as ops/formats.py has them.

    Raises:
        ValueError: a scale, a zero or the bias is no usable number.
    """
    expect_finite(f"{name}: scales", scales)
    expect_finite(f"{name}.bias", bias)
    layout = integer_layout(name, bits, zeros is not None, group_size, scales.dtype, in_features)
    if zeros is not None and bool((zeros == layout.format.zero).all()):
        zeros, layout = None, integer_layout(name, bits, False, group_size, scales.dtype, in_features)
    if zeros is not None:
        _expect_range(name, zeros, 255)
        zeros = zeros.to(torch.uint8).contiguous()
    return Weight(layout, Canonical(codes, scales.contiguous(), zeros), perm, bias)


def _expect_range(name: str, zeros: Tensor, largest: int) -> None:
    low, high = int(zeros.min()), int(zeros.max())
    if low < 0 or high > largest:
        raise ValueError(f"{name}: zero points are {low} .. {high}; valid: 0 .. {largest}")
