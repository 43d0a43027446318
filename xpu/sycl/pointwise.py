"""The bundle of the kernels that are not products: a decoder layer uses all of them, so they are compiled together."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .bundle import TYPES, Bundle

SOURCES = ("norm",)
#: Items of a work-group that handles one row.
ROW_ITEMS = 256


@lru_cache(maxsize=64)
def pointwise(element: torch.dtype, weight: torch.dtype | None = None, cache: torch.dtype | None = None) -> Bundle:
    """Return the bundle for dtypes of activations, of norm weights and of a key/value cache (None: that of activations)."""
    types = (("T", element), ("W", weight or element), ("KV", cache or element))
    return Bundle(SOURCES, tuple((name, TYPES[dtype]) for name, dtype in types))


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """Return x [..., K] as a matrix [M, K] whose elements of a row are contiguous, and the stride of its rows; copied if need be."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty((0, 0))
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    return x, x.stride(0)
