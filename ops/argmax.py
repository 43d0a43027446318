"""The position of the largest element of each row: greedy choice of a token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .check import check, check_floating
from .operator import Sample, operator


def _check(x: Tensor) -> None:
    check_floating(x, "x")
    check(x.dim() >= 1 and x.shape[-1] > 0, f"x has shape {list(x.shape)}; expected at least one element per row")


@operator()
def argmax(x: Tensor) -> Tensor:
    """``y[...] = min {k : x[..., k] = max_j x[..., j]}``: the first of equal elements; NaN counts as the largest.

    As `torch.argmax` over the last dimension of x in float32, which for logits of 16 bits needs a copy of them.

    Args:
        x: [..., K] float32, bfloat16 or float16, K > 0; rows may be strided.

    Returns:
        [...] contiguous, int64.

    Raises:
        RuntimeError: a row has no elements, or the dtype is not floating.
    """
    _check(x)
    nan = x.isnan()
    largest = torch.where(nan.any(-1, keepdim=True), nan, x == x.amax(-1, keepdim=True))
    return largest.to(torch.int8).argmax(-1)  # torch promises the first of equal elements


@argmax.fake
def _(x: Tensor) -> Tensor:
    _check(x)
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


@argmax.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    for shape in ((1, 1), (2, 3, 67), (5, 1), (3, 512), (2, 513), (0, 8), (1, 20000), (9, 5000), (7,)):
        yield Sample(f"{shape}", (torch.randn(shape, dtype=dtype),))
    ties = torch.randint(-3, 4, (4, 3000)).to(dtype)
    yield Sample("ties", (ties,))
    yield Sample("zeros of both signs", (torch.tensor([[-0.0, 0.0], [0.0, -0.0]], dtype=dtype),))
    yield Sample("strided rows", (torch.randn(3, 5, 1000, dtype=dtype)[:, -1],))
    yield Sample("every second element", (torch.randn(3, 1000, dtype=dtype)[:, ::2],))
    infinite = torch.randn(5, 2000, dtype=dtype)
    infinite[0, 1500:], infinite[1], infinite[2, 700], infinite[3, 7:900] = -torch.inf, -torch.inf, torch.inf, torch.inf
    yield Sample("infinite elements", (infinite,))
    nan = torch.randn(4, 70000, dtype=dtype)
    nan[0, 69999], nan[1, 5], nan[1, 3], nan[2] = torch.nan, torch.nan, torch.inf, torch.nan
    yield Sample("NaN", (nan,))
