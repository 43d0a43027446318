"""Bit fields of packed integers: how the codes of foreign checkpoints lie in int32 words.

All formats read here pack densely and start at the lowest bit: field i of a row takes bits i * bits .. i * bits + bits - 1
of the row's little-endian bit stream. Where bits divides 32 no field crosses a word; 3-bit fields do, 32 of them in three
words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.formats import join_codes

#: Integer dtypes that words may have (the bit stream of a row is the same for all).
WORD_DTYPES = (torch.int32, torch.uint32, torch.int64, torch.int16, torch.int8, torch.uint8)


def words(count: int, bits: int, word_bits: int = 32) -> int:
    """Return how many words `count` fields take."""
    return -(-count * bits // word_bits)


def as_bytes(packed: Tensor) -> Tensor:
    """Return the bytes of the rows of an integer matrix [R, W]: uint8 [R, W * itemsize], lowest byte first."""
    return packed.contiguous().view(torch.uint8)


def unpack_fields(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` fields of every row, one to a byte.

    Args:
        packed: [R, W] integers, at least `words(count, bits)` words of 32 bits wide. Pack along another dimension: transpose it.
        bits: of a field, 1..8.
        count: fields of a row.

    Returns:
        uint8 [R, count], values 0 .. 2 ** bits - 1.

    Raises:
        ValueError: the rows are too short, or bits is not 1..8.
    """
    stream = as_bytes(packed)
    if not 1 <= bits <= 8 or stream.shape[1] * 8 < count * bits:
        raise ValueError(f"{count} fields of {bits} bits do not lie in {list(packed.shape)} {packed.dtype}")
    if bits == 8:
        return stream[:, :count]
    eights = -(-count // 8)  # eight fields take `bits` bytes
    lacking = eights * bits - stream.shape[1]
    stream = torch.nn.functional.pad(stream, (0, lacking)) if lacking > 0 else stream[:, : eights * bits]
    stream = stream.unflatten(1, (eights, bits))
    fields = stream.new_empty((stream.shape[0], eights, 8))
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        field = stream[..., byte] >> shift
        if shift + bits > 8:
            field |= stream[..., byte + 1] << (8 - shift)
        fields[..., i] = field & ((1 << bits) - 1)
    return fields.flatten(1)[:, :count]


def canonical_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the fields of every row as codes of a canonical weight (ops/formats.py): int4 up to 4 bits, else int8.

    Args:
        packed: [N, W] integers, fields along the input features, as in `unpack_fields`.
        bits: of a field, 1..8.
        count: K.

    Returns:
        uint8 [N, ceil(K / 2)] or [N, K]. Four and eight bits are the bytes as they are: no field is touched.
    """
    if bits != 4:
        return join_codes(unpack_fields(packed, bits, count), 4 if bits < 4 else 8)
    stream = as_bytes(packed)
    if stream.shape[1] * 2 < count:
        raise ValueError(f"{count} fields of 4 bits do not lie in {list(packed.shape)} {packed.dtype}")
    codes = stream[:, : -(-count // 2)].contiguous()
    if count % 2:
        codes[:, -1] &= 15
    return codes
