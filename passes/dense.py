"""Linears of floating-point weights: gated pairs, linears that share their input, and what follows a linear."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from .. import ops
from .canonical import form
from .matching import Match
from .nodes import arguments, aten, insert_call, is_call, val
from .rewrite import Examples, GraphRewrite, Rewrite, RewriteReport

_dense_linear = ops.dense_linear.overload
_gated_linear = ops.gated_linear.overload
_parallel_linear = ops.parallel_linear.overload
_silu_mul = ops.silu_mul.overload
_gelu_mul = ops.gelu_mul.overload

SIZES = {"B": 61, "S": 67, "K": 48, "N": 71}


def _transposed_weight(x: Any) -> Node | None:
    """Return the constant or input [N, K] that `x` [K, N] is the transpose of, or None."""
    if not is_call(x, aten.permute.default) or val(x).dim() != 2:
        return None
    return x.args[0] if x.args[0].op in ("placeholder", "get_attr") else None


@form(aten.matmul.default, aten.mm.default)
def _product_is_linear(node: Node) -> Any:
    """``x @ weight.T`` in the spelling of a linear."""
    x, y = node.args[:2]
    weight = _transposed_weight(y)
    return None if weight is None else insert_call(node, aten.linear.default, x, weight)


@form(aten.addmm.default)
def _sum_is_linear(node: Node) -> Any:
    bias, x, y, *factors = arguments(node)
    weight = _transposed_weight(y)
    if weight is None or factors != [1, 1] or val(bias).dim() != 1:
        return None
    return insert_call(node, aten.linear.default, x, weight, bias)


def _variants(with_bias: Sequence[str], *extra: str) -> list[Callable[[Examples], dict[str, Any]]]:
    """Return example inputs with all biases and with none, for tokens of a batch and for rows; `extra` are [..., N]."""

    def make(rows: tuple[str, ...], biased: bool) -> Callable[[Examples], dict[str, Any]]:
        def inputs(e: Examples) -> dict[str, Any]:
            made: dict[str, Any] = {"x": e.like(*rows, "K")}
            for prefix in with_bias:
                made[f"{prefix}weight"] = e.like("N", "K")
                if biased:
                    made[f"{prefix}bias"] = e.like("N")
            return {**made, **{name: e.like(*rows, "N") for name in extra}}

        return inputs

    return [make(rows, biased) for rows in (("B", "S"), ("B",)) for biased in (True, False)]


def weights_are_dense(match: Match) -> str | None:
    """Refuse weights whose rows are not contiguous: the kernels read rows in place."""
    for name, node in match.inputs.items():
        if name.endswith("weight") and val(node).stride(-1) != 1:
            return f"{name} has stride {val(node).stride(-1)} in its last dimension"
    return None


_GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": _silu_mul,
    "gelu": lambda gate, up: _gelu_mul(gate, up, "none"),
    "gelu_tanh": lambda gate, up: _gelu_mul(gate, up, "tanh"),
}


def _gated(activation: str) -> Rewrite:
    def pattern(
        x: Tensor, gate_weight: Tensor, up_weight: Tensor, gate_bias: Any = None, up_bias: Any = None
    ) -> Tensor:
        gate, up = functional.linear(x, gate_weight, gate_bias), functional.linear(x, up_weight, up_bias)
        return _GATES[activation](gate, up)

    def replacement(x: Any, gate_weight: Any, up_weight: Any, gate_bias: Any = None, up_bias: Any = None) -> Any:
        return _gated_linear(x, gate_weight, up_weight, gate_bias, up_bias, activation)

    inputs = _variants(("gate_", "up_"))
    needs = (aten.linear.default, _silu_mul if activation == "silu" else _gelu_mul)
    return Rewrite(
        f"gated_linear, {activation}", pattern, replacement, inputs, SIZES, check=weights_are_dense, needs=needs
    )


_FOLLOWED: dict[str, Callable[..., Tensor]] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "add": torch.add,
    "mul": torch.mul,
    "none": lambda y: y,
}


def _followed(epilogue: str) -> Rewrite:
    def pattern(x: Tensor, weight: Tensor, bias: Any = None, other: Any = None) -> Tensor:
        y = functional.linear(x, weight, bias)
        return _FOLLOWED[epilogue](y) if other is None else _FOLLOWED[epilogue](y, other)

    def replacement(x: Any, weight: Any, bias: Any = None, other: Any = None) -> Any:
        return _dense_linear(x, weight, bias, other, epilogue)

    inputs = _variants(("",), *(("other",) if epilogue in ("add", "mul") else ()))
    name = "linear" if epilogue == "none" else f"linear + {epilogue}"
    calls = {"relu": aten.relu, "silu": aten.silu, "gelu": aten.gelu, "gelu_tanh": aten.gelu}
    needs = (aten.linear.default, *((calls[epilogue].default,) if epilogue in calls else ()))
    return Rewrite(name, pattern, replacement, inputs, SIZES, check=weights_are_dense, needs=needs)


def _is_plain(node: Node) -> bool:
    x, weight, bias = arguments(node)
    dtypes = {val(t).dtype for t in (x, weight, bias) if t is not None}
    constant = all(t is None or t.op in ("placeholder", "get_attr") for t in (weight, bias))
    kernel = dtypes <= {torch.float32, torch.bfloat16, torch.float16} and len(dtypes) == 1
    return constant and kernel and val(weight).dim() == 2 and val(weight).stride(-1) == 1


def _parallel(gm: GraphModule, report: RewriteReport) -> int:
    """Join linears of one input; they need not stand together, since their weights are constants of the graph."""
    groups: dict[Node, list[Node]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        if _is_plain(node):
            groups.setdefault(node.args[0], []).append(node)
    fired = 0
    for x, linears in groups.items():
        if len(linears) < 2:
            continue
        weights, biases = [n.args[1] for n in linears], [arguments(n)[2] for n in linears]
        first = min(linears)
        joined = insert_call(first, _parallel_linear, x, weights, biases)
        for index, node in enumerate(linears):
            node.replace_all_uses_with(insert_call(first, operator.getitem, joined, index))
        for node in linears:
            gm.graph.erase_node(node)
        fired += 1
    return fired


GATED_LINEARS = tuple(_gated(activation) for activation in _GATES)
PARALLEL_LINEARS = (GraphRewrite("parallel linears", _parallel),)
LINEARS = tuple(_followed(epilogue) for epilogue in _FOLLOWED)
