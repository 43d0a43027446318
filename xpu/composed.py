"""Routes made of torch's operators and of ours that have kernels: float linears, which vendors' libraries do best, what runs once per
weight, and what a device has no kernel of its own for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import ops
from ..ops.experts import check_values
from ..ops.linear import activate
from ..ops.static_linear import quantize_input
from .route import route


def _finish(y: Tensor, other: Tensor | None, epilogue: str) -> Tensor:
    """Return what an epilogue makes of a linear's result; sums and products in the dtype of y, as torch does them."""
    if other is not None:
        return y + other if epilogue == "add" else y * other
    return y if epilogue == "none" else activate(y, epilogue)


@route("torch", "dense_linear")
def dense_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, epilogue: str = "none"
) -> Tensor:
    """Run `ops.dense_linear`; the product is rounded to the dtype of x before the epilogue."""
    ops.dense_linear.empty(x, weight, bias, other, epilogue)
    return _finish(linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)), other, epilogue)


@route("torch", "parallel_linear")
def parallel_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """Run `ops.parallel_linear`."""
    ops.parallel_linear.empty(x, weights, biases)
    each = biases or [None] * len(weights)
    return [dense_linear(x, weight, bias, None) for weight, bias in zip(weights, each, strict=True)]


@route("torch", "gated_linear")
def gated_linear(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Run `ops.gated_linear`."""
    ops.gated_linear.empty(x, gate_weight, up_weight, gate_bias, up_bias, activation)
    gate = dense_linear(x, gate_weight, gate_bias, None)
    return activate(gate, activation) * dense_linear(x, up_weight, up_bias, None)


@route("torch", "static_linear")
def static_linear(
    x: Tensor,
    weight: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    factors: Tensor | None,
    input_scale: float,
    input_zero: int,
    layout: str,
    out_features: int,
    epilogue: str = "none",
) -> Tensor:
    """Run `ops.static_linear` as a linear of float32 over what the activations' codes stand for."""
    ops.static_linear.empty(
        x, weight, sums, bias, other, factors, input_scale, input_zero, layout, out_features, epilogue
    )
    v = quantize_input(x, factors, input_scale, input_zero) * input_scale
    addend = None if other is None else other.float()
    return ops.quant_linear(v, weight, bias, addend, layout, out_features, "fp32", epilogue).to(x.dtype)


@route("torch", "quant_experts")
def quant_experts(
    x: Tensor,
    indices: Tensor,
    scores: Tensor,
    gate_up: Tensor,
    down: Tensor,
    perm: Tensor | None,
    down_perm: Tensor | None,
    layout: str,
    down_layout: str,
    width: int,
    compute: str = "int8",
    down_compute: str = "int8",
    activation: str = "silu",
) -> Tensor:
    """Run `ops.quant_experts`: two linears for each expert that was chosen, which the device is asked for."""
    y = ops.quant_experts.empty(
        *(x, indices, scores, gate_up, down, perm, down_perm, layout, down_layout),
        *(width, compute, down_compute, activation),
    )
    check_values(indices, perm, down_perm, gate_up.shape[0])
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in indices.unique().tolist():
        token, place = torch.where(indices == expert)
        rows = x[token].float()
        rows = rows if perm is None else rows[:, perm[expert]]
        hidden = ops.quant_linear(rows, gate_up[expert], None, None, layout, width, compute, f"{activation}_mul")
        hidden = hidden if down_perm is None else hidden[:, down_perm[expert]]
        out = ops.quant_linear(hidden, down[expert], None, None, down_layout, x.shape[1], down_compute)
        total.index_add_(0, token, scores[token, place, None].float() * out)
    return y.copy_(total)


#: Once per weight: their references are torch's operators on any device.
for _name in ("pack_weight", "unpack_weight", "quantize_weight"):
    route("torch", _name)(ops.OPERATORS[_name].reference)
