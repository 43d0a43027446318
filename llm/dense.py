"""Linears that stay floating point: the operator runs them where nobody asks for gradients, over the weight as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops

_dense_linear = ops.dense_linear.overload
_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
            or type(x) not in _PLAIN
            or torch.is_autocast_enabled(x.device.type)
            or type(weight) not in _PLAIN
            or weight.dtype not in _DTYPES
        ):
            return functional.linear(x, weight, bias)
        return _dense_linear(x, weight, bias, None)
