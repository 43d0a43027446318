"""Rotary position embedding written out in slices and products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .rewrite import Examples, Rewrite

_rope = ops.rope.overload

#: D = R when the whole head is rotated; R is even, F = R / 2.
SIZES = {"B": 3, "S": 5, "H": 7, "Hk": 11, "R": 26, "F": 13, "D": 42}


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


def _to_rope(query: Any, key: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    rotated = _rope(query.permute(0, 2, 1, 3), key.permute(0, 2, 1, 3), cos, sin, None, 0, False)
    return rotated[0].permute(0, 2, 1, 3), rotated[1].permute(0, 2, 1, 3)


ROPES = (Rewrite("rope", _half, _to_rope, _whole, SIZES, loose=("B",)),)
