"""How a key/value cache stores the elements that one token has in one head: in floating point, or as int8 with a scale.

A row of an int8 cache is [D + 4] bytes: D codes, then their scale as the four bytes of a float32. Value = code * scale, scale = largest
magnitude of the row / 127. Code and scale lie together, so that every view, copy and index of a cache keeps them together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .check import check, check_floating

SCALE_BYTES = 4
#: Rows whose largest magnitude is not above this are stored as zeros: 127 / magnitude must be finite.
SMALLEST = 1e-30


def stored_width(width: int, dtype: torch.dtype) -> int:
    """Return the size of the last dimension of a cache of `dtype` whose heads have `width` elements."""
    return width + SCALE_BYTES if dtype == torch.int8 else width


def row_width(cache: Tensor) -> int:
    """Return the elements of a head in a cache [..., D] or, int8, [..., D + 4]."""
    return cache.shape[-1] - SCALE_BYTES if cache.dtype == torch.int8 else cache.shape[-1]


def check_stored(cache: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise RuntimeError unless a cache can hold what tokens of `dtype` bring."""
    fits = cache.dtype in (torch.int8, torch.float16, torch.float32, torch.float64, dtype)  # float64: references only
    check(
        fits,
        f"{name} has dtype {str(cache.dtype)[6:]}; valid with {str(dtype)[6:]} tokens: "
        f"{'' if dtype == torch.float16 else str(dtype)[6:] + ', '}float16, int8",
    )
    if cache.dtype == torch.int8:
        check(
            cache.shape[-1] >= SCALE_BYTES,
            f"{name} has rows of {cache.shape[-1]} bytes; expected D codes and a scale of {SCALE_BYTES}",
        )


def store_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return floating rows [..., D] as a cache of `dtype` stores them: [..., D], or int8 [..., D + 4]."""
    check_floating(x, "x")
    if dtype != torch.int8:
        return x.to(dtype)
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    some = largest > SMALLEST
    scale = torch.where(some, largest / 127, 0.0)
    inverse = torch.where(some, torch.full_like(largest, 127) / largest, 0.0)  # 127 / x would be 127 * (1 / x)
    codes = (x * inverse).round().clamp(-127, 127).to(torch.int8)
    return torch.cat((codes, scale.contiguous().view(torch.int8)), -1)


def load_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows of a cache as floating point [..., D]."""
    if rows.dtype != torch.int8:
        return rows.to(dtype)
    codes, scale = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (codes.float() * scale).to(dtype)
