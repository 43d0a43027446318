"""Row normalizations, alone and after a residual addition."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .check import check_floating, check_shape
from .operator import Sample, operator


def wide(x: Tensor) -> Tensor:
    """Return `x` in the dtype that references compute in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


@operator()
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Root mean square norm: ``y = x / sqrt(mean(x^2) + eps) * (weight + offset)``, rounded once at the end.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4; the (1 + w) form is Gemma's.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        weight: [K], a floating dtype of its own.
        eps: added to the mean square.
        offset: added to the weight; 1.0 for the (1 + w) form.

    Returns:
        [..., K] in the dtype of x.

    Raises:
        RuntimeError: weight is not [K], or a dtype is not floating.
    """
    check_floating(x, "x")
    check_floating(weight, "weight")
    check_shape(weight, (x.shape[-1],), "weight")
    v = wide(x)
    y = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * (wide(weight) + offset)
    return y.to(x.dtype)


@rms_norm.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    for shape in ((1, 1, 64), (2, 3, 67), (5, 1), (33, 300), (0, 8)):
        x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
        yield Sample(f"{shape}", (x, weight, 1e-5))
        yield Sample(f"{shape} offset", (x, weight.float(), 1e-6, 1.0))
    yield Sample("row stride", (torch.randn(4, 160, dtype=dtype)[:, :80], torch.randn(80, dtype=dtype), 1e-5))
