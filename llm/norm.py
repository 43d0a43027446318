"""Norm modules over the operators; they keep the parameters, and their names, of the modules they replace."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops

_rms_norm = ops.rms_norm.overload
_layer_norm = ops.layer_norm.overload


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * (weight + offset)`` over the last dimension.

    Args:
        weight: [K].
        eps: added to the mean square.
        offset: 1.0 for the (1 + weight) form, else 0.0.
    """

    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        """Take the parameter over."""
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., K] in its dtype."""
        return _rms_norm(x, self._parameters["weight"], self.eps, self.offset)

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}, offset={self.offset}"


class LayerNorm(nn.Module):
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension; weight and bias may be None."""

    def __init__(self, weight: nn.Parameter | None, bias: nn.Parameter | None, eps: float) -> None:
        """Take the parameters over."""
        super().__init__()
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., K] in its dtype."""
        return _layer_norm(x, self._parameters["weight"], self._parameters["bias"], self.eps)

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return f"eps={self.eps}, weight={self.weight is not None}, bias={self.bias is not None}"


def rms_norm_eps(module: nn.Module) -> float | None:
    """Return eps of a module that has the structure of an RMS norm: one 1-D weight, no child, an eps. Else None."""
    if list(module._parameters) != ["weight"] or module._modules or module._buffers:
        return None
    weight = module._parameters["weight"]
    if weight is None or weight.dim() != 1:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(eps) if isinstance(eps, float) else None


def is_layer_norm(module: nn.Module) -> bool:
    """Return whether the module is torch's LayerNorm over one dimension, with its own forward."""
    return type(module).forward is nn.LayerNorm.forward and len(module.normalized_shape) == 1  # type: ignore[arg-type]


def convert_norm(module: nn.Module, offset: float | None) -> nn.Module:
    """Return the replacement: an `RMSNorm` with this offset, or a `LayerNorm` when offset is None."""
    if offset is None:
        return LayerNorm(module.weight, module.bias, float(module.eps))  # type: ignore[arg-type]
    eps = rms_norm_eps(module)
    assert eps is not None
    norm = RMSNorm(module.weight, eps, offset)  # type: ignore[arg-type]
    norm.training = module.training
    return norm


def stand_in(module: nn.Module, features: int = 8) -> nn.Module:
    """Return a shallow copy of an RMS norm with a small random float32 weight of its own."""
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__.update(module.__dict__)
    clone.__dict__["_parameters"] = {"weight": nn.Parameter(torch.randn(features), requires_grad=False)}
    return clone
