"""Linear layers over packed weights: see xpu/triton/products.py."""

from typing import Any

from torch import Tensor

from ... import ops
from ..route import route
from .decode import refuses_weight
from .launch import refuses_double
from .products import multiply


def _refuses(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, *args: Any, **kw: Any) -> str | None:
    return refuses_double(x, bias) or refuses_weight(weight)


@route("triton", "quant_linear", _refuses)
def quant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    layout: str,
    out_features: int,
    compute: str = "int8",
    epilogue: str = "none",
) -> Tensor:
    """See `llmrt.ops.quant_linear`."""
    y = ops.quant_linear.empty(x, weight, bias, other, layout, out_features, compute, epilogue)
    if y.numel():
        addend = None if other is None else other.reshape(-1, out_features)
        out = y.view(-1, out_features)
        multiply(x.reshape(-1, x.shape[-1]), weight, bias, addend, out, layout, compute, epilogue)
    return y
