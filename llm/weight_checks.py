"""Checks of the weights that a plan will quantize, before anything is changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .experts import StoredExperts, is_experts
from .linear import CanonicalLinear
from .memory import FilePages, tensors_of
from .plan import Plan, Step, is_linear


def weights_of(model: nn.Module, step: Step) -> list[Tensor]:
    """Return the tensors of the linears of a step."""
    modules = [model.get_submodule(name) for name in step.names]
    taken = (m for m in modules if is_linear(m) or is_experts(m) or isinstance(m, StoredExperts))
    return [t for module in taken for t in tensors_of(module)]


def check_weights(model: nn.Module, plan: Plan) -> None:
    """Raise ValueError if a weight that will be quantized is not a finite floating matrix."""
    pages = FilePages(model)
    for step in plan.steps:
        if not step.schemes:
            continue
        pages.read_ahead(weights_of(model, step))
        for name in step.names:
            _check_weight(name, model.get_submodule(name))
        pages.release()


def _check_weight(name: str, module: nn.Module) -> None:
    if isinstance(module, StoredExperts):
        for part, linear in module.named_modules():
            _check_weight(f"{name}.{part}", linear) if isinstance(linear, CanonicalLinear) else None
    elif isinstance(module, CanonicalLinear):
        try:
            part = module.canonical()
        except RuntimeError as error:
            raise ValueError(f"{name}: {error}") from None
        if not bool(torch.isfinite(part.scales).all()):
            raise ValueError(f"{name}.scales has NaN or infinite values")
    elif isinstance(module, nn.Linear) or is_experts(module):
        for key, weight in module.named_parameters(recurse=False):
            if key == "bias" or not weight.numel():
                continue
            extremes = torch.aminmax(weight.detach())  # a NaN makes both NaN
            if not all(bool(torch.isfinite(t)) for t in extremes):
                raise ValueError(f"{name}.{key} has NaN or infinite values; it cannot be quantized")
