"""The bundle of the kernels that are not products: a decoder layer uses all of them, so they are compiled together."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .bundle import TYPES, Bundle

SOURCES = ("norm", "rope", "kv_append", "rope_append", "gated", "argmax")
#: Items of a work-group that handles one row.
ROW_ITEMS = 256
#: Heads that a work-group handles, one in each of its sub-groups, and its sizes.
HEADS = 8
HEADS_LOCAL = (1, 1, 16 * HEADS)


@lru_cache(maxsize=8)
def pointwise(element: torch.dtype) -> Bundle:
    """Return the bundle for a dtype of activations; kernels learn the dtypes of weights, tables and caches at run time."""
    return Bundle(SOURCES, (("T", TYPES[element]),))


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """Return x [..., K] as a matrix [M, K] whose elements of a row are contiguous, and the stride of its rows; copied if need be."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty((0, 0))
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


def head_groups(heads: int) -> tuple[int, int, int]:
    """Return the numbers of work-groups for a number of heads."""
    return 1, 1, -(-heads // HEADS)


def last_dense(x: Tensor) -> Tensor:
    """Return x, copied if the elements of its last dimension are not contiguous."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()
