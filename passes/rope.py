"""Rotary position embedding written out in slices and products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .rewrite import Examples, Rewrite

_rope = ops.rope.overload

#: D = R when the whole head is rotated; R is even, F = R / 2.
SIZES = {"B": 61, "S": 67, "H": 71, "Hk": 73, "R": 46, "F": 23, "D": 106, "P": 83}


def _whole(e: Examples) -> dict[str, Any]:
    return {
        "query": e.like("B", "H", "S", "R"),
        "key": e.like("B", "Hk", "S", "R"),
        "cos": e.like("B", "S", "R"),
        "sin": e.like("B", "S", "R"),
    }


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _half(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return query * cos + _rotate_half(query) * sin, key * cos + _rotate_half(key) * sin


def _swap(x: Any) -> Any:
    """[B, H, S, D] <-> [B, S, H, D]."""
    return torch.ops.aten.permute.default(x, [0, 2, 1, 3])


def _to_rope(query: Any, key: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    rotated = _rope(_swap(query), _swap(key), cos, sin, None, 0, False)
    return _swap(rotated[0]), _swap(rotated[1])


ROPES = (Rewrite("rope", _half, _to_rope, _whole, SIZES, loose=("B",)),)
