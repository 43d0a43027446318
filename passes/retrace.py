"""From what Dynamo captured to one regular form: ATen operators as they stand before autograd and decomposition.

Dynamo's graph holds methods, functions and operators in as many spellings as models are written in. Running it once over fake
tensors under a tracer gives the form that ``torch.export`` uses too: every call an ATen or llmrt overload with its arguments in
place, ``linear``, ``layer_norm`` and ``scaled_dot_product_attention`` whole, and the result's shape and dtype in ``meta["val"]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx


def fake_inputs(inputs: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """Return a fake mode and the inputs as its tensors, with the symbolic sizes that Dynamo gave them."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if mode is None:
        found = next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), None)
        mode = found or FakeTensorMode(allow_non_fake_inputs=True)

    def fake(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or (isinstance(x, FakeTensor) and x.fake_mode is mode):
            return x
        symbolic = None if context is None else context.tensor_to_context.get(x)
        if symbolic is None:
            return mode.from_tensor(x, static_shapes=True)
        source = getattr(symbolic, "tensor_source", None)
        return mode.from_tensor(x, symbolic_context=symbolic, source=source, trace=False)

    return mode, [fake(x) for x in inputs]


def _with_constant(arguments: Any, node: torch.fx.Node, constant: float) -> Any:
    return torch.fx.node.map_arg(arguments, lambda a: constant if a is node else a)


def specialize_floats(gm: torch.fx.GraphModule) -> None:
    """Put the values of floats that Dynamo made symbolic (``dynamic=True``) into the graph; Dynamo then guards on them.

    An epsilon or a scale that is read from a module arrives as a tensor and its ``item()``; no operator takes that, and no model
    changes it.
    """
    for node in list(gm.graph.nodes):
        value = node.meta.get("example_value")
        if node.op == "call_method" and node.target == "item" and isinstance(value, torch.SymFloat):
            constant = float(value)
            for user in list(node.users):
                user.args, user.kwargs = _with_constant((user.args, user.kwargs), node, constant)
            gm.graph.erase_node(node)
    gm.recompile()


def trace(function: Callable[..., Any], inputs: Sequence[Any], mode: FakeTensorMode | None) -> torch.fx.GraphModule:
    """Return the graph of `function` over inputs that are fake already, in ATen operators before dispatch."""
    tracer = make_fx(function, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)
    if mode is None:
        return tracer(*inputs)
    allowed, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        with mode, enable_python_dispatcher():
            return tracer(*inputs)
    finally:
        mode.allow_non_fake_inputs = allowed


def is_held_by_module(placeholder: torch.fx.Node) -> bool:
    """Return whether Dynamo read an input from a module: a parameter, a buffer or another tensor that is its attribute."""
    guard_source = getattr(getattr(placeholder, "_dynamo_source", None), "guard_source", None)
    return guard_source is not None and (
        guard_source.is_unspecialized_nn_module() or guard_source.is_specialized_nn_module()
    )


def retrace(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> torch.fx.GraphModule:
    """Return a Dynamo graph in ATen operators, with the same placeholders in the same order.

    Inputs that Dynamo read from a module have the real tensor in ``meta["static"]``.

    Args:
        gm: graph that Dynamo captured; its symbolic floats become constants in place.
        example_inputs: its inputs, fake or real; real ones become fake, with the symbolic sizes of Dynamo's tracing context.
    """
    specialize_floats(gm)
    mode, inputs = fake_inputs(example_inputs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    traced = trace(gm, inputs, mode)
    for node, captured, x in zip(
        traced.graph.nodes, placeholders, example_inputs, strict=False
    ):  # placeholders come first
        node.target = node.name = captured.name
        if is_held_by_module(captured) and isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor):
            node.meta["static"] = x
    traced.recompile()
    return traced
