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


def differ(size: int, expected: int) -> bool:
    """Return whether two sizes are unequal, of symbolic ones only whether they are certain to be.

    Fake kernels see symbolic sizes. To compare them outright would specialize the graph to the answer; where it is open,
    the kernel checks the real sizes.
    """
    if isinstance(size, int) and isinstance(expected, int):
        return size != expected
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes 0.3 s, and only tracing needs it

    return statically_known_true(size != expected)


def check_shape(x: Tensor, sizes: Sequence[int], name: str) -> None:
    """Raise unless `x` has this shape; -1 stands for any size."""
    wrong = x.dim() != len(sizes)
    if wrong or any(not _is_any(e) and differ(s, e) for s, e in zip(x.shape, sizes, strict=True)):
        expected = ", ".join("any" if _is_any(e) else str(e) for e in sizes)
        raise RuntimeError(f"{name} has shape {list(x.shape)}; expected [{expected}]")


def _is_any(size: int) -> bool:
    return isinstance(size, int) and size < 0


def check_broadcast(x: Tensor, rows: int, name: str) -> None:
    """Raise unless the first dimension of `x` is 1 or `rows`, the size of query's."""
    fits = not (differ(x.shape[0], rows) and differ(x.shape[0], 1))
    check(fits, f"{name} has {x.shape[0]} rows; valid: 1 or {rows}, as query")
