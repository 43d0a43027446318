"""Linears that stay floating point: the operator runs them where nobody asks for gradients, over the weight as it is."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops

_dense_linear = ops.dense_linear.overload
_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_HUGE_PAGE = 2 << 20
_ADVISE_HUGE_PAGES, _COLLAPSE = 14, 25  # MADV_HUGEPAGE and, since Linux 6.1, MADV_COLLAPSE


class DenseLinear(nn.Linear):
    """torch's linear over `ops.dense_linear`. A module becomes one by its class: its weight, hooks and names stay.

    With gradients or autocast on, while a graph is traced (its rewrites join what several linears do), and for tensors of other kinds it is
    torch's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N] for x [..., K]."""
        weight, bias = self.weight, self.bias
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or type(x) not in _PLAIN
            or type(weight) not in _PLAIN
            or weight.dtype not in _DTYPES
        ):
            return functional.linear(x, weight, bias)
        return _dense_linear(x, weight, bias, None)


def use_huge_pages(weights: Iterable[Tensor]) -> None:
    """Ask the system to move weights to pages of 2 MB, which are read up to a tenth faster than pages of 4 KB.

    No value and no address changes. It takes 0.3 to 2 s per GB. What lies in a mapped file stays where it is, and so does everything on
    systems without such pages.
    """
    for weight in {weight.data_ptr(): weight for weight in weights}.values():
        _advise(weight, _ADVISE_HUGE_PAGES, _COLLAPSE)


def converted(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy in another dtype, on huge pages from the start, which takes no time."""
    result = torch.empty_like(weight, dtype=dtype)
    _advise(result, _ADVISE_HUGE_PAGES)
    return result.copy_(weight)


def _advise(data: Tensor, *advices: int) -> None:
    """Give advice about the huge pages that lie wholly inside a tensor; the system may ignore it."""
    start = -(-data.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    length = (data.data_ptr() + data.nbytes) // _HUGE_PAGE * _HUGE_PAGE - start
    if length <= 0 or not data.is_contiguous() or data.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for advice in advices:
        madvise(start, length, advice)
