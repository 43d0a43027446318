"""Blocks of ggml's quantized types as canonical weights, where a layout here has the very same values.

All take blocks of 32 values along the input features, each with a float16 scale d in its first two bytes:

- Q4_0: 16 bytes; their low nibbles are elements 0..15, their high nibbles 16..31; value = (nibble - 8) * d: int4, groups of 32.
- Q8_0: 32 int8; value = integer * d: int8.
- Q5_0 (5-bit integers) and IQ4_NL (a table of 16 integers): value = integer * d, so int8 too.

The other types scale their scales or shift their values: no layout here has those values, they are dequantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops.formats import Layout, join_codes
from ..linear import Canonical
from .reader import Weight

GROUP = 32
#: Types by name whose blocks become canonical weights.
EXACT = ("Q4_0", "Q8_0", "Q5_0", "IQ4_NL")


def canonical_blocks(name: str, kind: str, blocks: Tensor, floats: Callable[[Tensor], Tensor]) -> Weight:
    """Return the weight [N, K] of blocks.

    Args:
        name: of the tensor, for messages.
        kind: one of `EXACT`.
        blocks: uint8 [N, K / 32, bytes of a block].
        floats: dequantizes rows of blocks, uint8 [R, bytes] -> float32 [R, K].

    Raises:
        ValueError: a scale is NaN or infinite.
    """
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(f"{name} has a scale that is NaN or infinite; the file is damaged")
    if kind == "Q4_0":
        nibbles = blocks[..., 2:]
        codes = join_codes(torch.cat((nibbles & 15, nibbles >> 4), -1).flatten(1), 4)
    elif kind == "Q8_0":
        codes = (blocks[..., 2:] ^ 128).flatten(1)  # two's complement to offset binary
    else:
        codes = torch.cat(
            [_integers(part, scale, floats) for part, scale in zip(blocks.split(256), scales.split(256), strict=True)]
        )
    return Weight(
        Layout("int4" if kind == "Q4_0" else "int8", False, GROUP, torch.float16), Canonical(codes, scales, None)
    )


def _integers(blocks: Tensor, scales: Tensor, floats: Callable[[Tensor], Tensor]) -> Tensor:
    """Return codes of values that are an integer times the scale: a float32 holds the product exactly, so division gives it back."""
    values = floats(blocks.flatten(1)).unflatten(1, (-1, GROUP))
    divisor = scales.float().unsqueeze(-1)
    integers: Any = torch.where(divisor == 0, 0, values / divisor)
    return (integers.round().int() + 128).to(torch.uint8).flatten(1)
