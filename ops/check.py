"""Argument checks of the references, with the messages of csrc/tensor.h: they name the argument, its value and what is valid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # float64 is for references only


def check(condition: bool, message: str) -> None:
    """Raise RuntimeError with `message` unless `condition` holds (the C++ kernels raise the same type)."""
    if not condition:
        raise RuntimeError(message)


def check_floating(x: Tensor, name: str) -> None:
    """Raise unless `x` has one of the activation dtypes."""
    check(x.dtype in FLOATING, f"{name} has dtype {str(x.dtype)[6:]}; valid: float32, bfloat16, float16")


def check_dtype(x: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise unless `x` has exactly this dtype."""
    check(x.dtype == dtype, f"{name} has dtype {str(x.dtype)[6:]}; expected {str(dtype)[6:]}")


def check_shape(x: Tensor, sizes: Sequence[int], name: str) -> None:
    """Raise unless `x` has this shape; -1 stands for any size."""
    same = x.dim() == len(sizes) and all(e < 0 or s == e for s, e in zip(x.shape, sizes, strict=True))
    if not same:
        expected = ", ".join("any" if e < 0 else str(e) for e in sizes)
        raise RuntimeError(f"{name} has shape {list(x.shape)}; expected [{expected}]")
