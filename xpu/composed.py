"""Routes made of torch's own operators: float linears, which vendors' libraries do best, and what runs once per weight."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from .. import ops
from ..ops.linear import activate
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
    return [dense_linear(x, weight, bias, None) for weight, bias in zip(weights, biases, strict=True)]


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


for _name in (
    "unpack_weight",
    "quantize_weight",
):  # once per weight: their references are torch's operators on any device
    route("torch", _name)(ops.OPERATORS[_name].reference)
