"""A graph as one flat Python function: a line per call, constants bound, values freed after their last use, no guards.

Calls of common ATen operators go through torch's own Python functions, which parse arguments one to three microseconds faster than
the operator objects of a graph; everything else goes through the operator object's function below its `__call__`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten
_functions = torch._C._VariableFunctions
_nn: Any = torch._C._nn

#: Overloads whose schema has the arguments of torch's Python function of the same name, in the same order.
_SAME_ARGUMENTS: dict[Any, Callable[..., Any]] = {
    getattr(getattr(aten, name), overload): getattr(source, name)
    for source, overload, names in (
        (_functions, "default", "reshape permute unsqueeze split_with_sizes embedding layer_norm matmul bmm mm addmm cos sin "
         "rsqrt sqrt neg exp reciprocal tanh sigmoid relu abs cat"),
        (_functions, "int", "transpose select softmax"),
        (_functions, "Tensor", "add sub mul div eq ne lt le gt ge where"),
        (_functions, "Tensor_Scalar", "pow"),
        (_functions, "dim", "mean squeeze"),
        (_nn, "default", "linear silu gelu scaled_dot_product_attention"),
        (torch.Tensor, "default", "view expand"),
    )
    for name in names.split()
    if hasattr(getattr(aten, name), overload) and hasattr(source, name)
}  # fmt: skip

_INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//", operator.mod: "%",
    operator.truediv: "/", operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=",
    operator.gt: ">", operator.ge: ">=",
}  # fmt: skip
#: What `repr` writes as Python reads it back, beside finite floats.
_LITERALS = (bool, int, str, type(None), type(...))


def _function_of(node: Node) -> Callable[..., Any]:
    """Return the cheapest callable that takes the node's arguments."""
    target: Any = node.target
    if target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        return torch.Tensor.to
    same = _SAME_ARGUMENTS.get(target)
    if same is not None:
        return same
    return target._op if isinstance(target, torch._ops.OpOverload) else target


def _narrow(node: Node) -> tuple[Any, ...] | None:
    """Return the arguments of `narrow` if the node is a slice with fixed bounds inside a fixed size."""
    args = node.args
    if node.target is not aten.slice.Tensor or node.kwargs or len(args) != 4 or not isinstance(args[0], Node):
        return None
    source, (_, dim, start, end) = args[0].meta.get("val"), args
    if not isinstance(source, torch.Tensor) or not all(type(i) is int for i in (dim, start, end)):
        return None
    size = source.shape[dim]  # type: ignore[index]
    if type(size) is not int or not 0 <= start <= min(end, size):  # type: ignore[operator,type-var]
        return None
    return args[0], dim, start, min(end, size) - start  # type: ignore[operator,type-var]


class _Writer:
    """Writes the function's source and collects what it binds."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.names: dict[Node, str] = {}
        self.bound: dict[str, Any] = {}
        self.known: dict[int, str] = {}
        self.lines: list[str] = []
        self.last_use = self._last_uses()
        self.taken = {node.name for node in gm.graph.nodes}

    def _last_uses(self) -> dict[Node, list[Node]]:
        """Return node -> values that nothing reads after it. Inputs and constants belong to others."""
        dying: dict[Node, list[Node]] = {}
        seen: set[Node] = set()
        for node in reversed(self.gm.graph.nodes):
            for used in node.all_input_nodes:
                number = isinstance(used.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)
                theirs = used.op in ("placeholder", "get_attr") or node.op == "output"
                if not (used in seen or number or theirs):
                    dying.setdefault(node, []).append(used)
                seen.add(used)
        return dying

    def bind(self, value: Any, hint: str) -> str:
        """Return the name under which the function knows an object."""
        if id(value) not in self.known:
            name = f"{hint}_{len(self.bound)}"
            while name in self.taken:
                name += "_"
            self.known[id(value)], self.bound[name] = name, value
        return self.known[id(value)]

    def text(self, value: Any, lists_may_be_tuples: bool = False) -> str:
        """Return an argument as source."""
        if isinstance(value, Node):
            return self.names[value]
        if type(value) in _LITERALS or (type(value) is float and math.isfinite(value)):
            return repr(value)
        if isinstance(value, slice):
            return f"slice({', '.join(self.text(x) for x in (value.start, value.stop, value.step))})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self.text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            parts = [self.text(x, lists_may_be_tuples) for x in value]
            if isinstance(value, list) and not lists_may_be_tuples:
                return f"[{', '.join(parts)}]"
            return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
        return self.bind(value, "constant")

    def expression(self, node: Node) -> str:
        """Return the call of a node as source."""
        target: Any = node.target
        if node.op == "call_function" and not node.kwargs:
            if target is operator.getitem:
                return f"{self.text(node.args[0])}[{self.text(node.args[1])}]"
            if target in _INFIX:
                return f" {_INFIX[target]} ".join(self.text(x) for x in node.args)
            if target is aten.sym_size.int:
                return f"{self.text(node.args[0])}.shape[{self.text(node.args[1])}]"
        if narrow := _narrow(node):
            return f"{self.bind(_functions.narrow, 'narrow')}({', '.join(self.text(x) for x in narrow)})"
        arguments, tuples = node.args, False
        if node.op == "call_method":
            head, arguments = f"{self.text(node.args[0])}.{target}", node.args[1:]
        elif node.op == "call_module":
            head = self.bind(self.gm.get_submodule(target), "module")
        else:
            function = _function_of(node)
            tuples = target in _SAME_ARGUMENTS
            head = self.bind(function, getattr(target, "__name__", "function").partition(".")[0].strip("_"))
        parts = [self.text(x, tuples) for x in arguments]
        parts += [f"{key}={self.text(x, tuples)}" for key, x in node.kwargs.items()]
        return f"{head}({', '.join(parts)})"

    def unpacked(self, node: Node) -> list[str] | None:
        """Return the names of a call's results if all its users pick one by number, "_" for those nobody picks."""
        results = node.meta.get("val")
        if not isinstance(results, list | tuple) or not node.users:
            return None
        picked: dict[int, Node] = {}
        for user in node.users:
            index = user.args[1] if user.op == "call_function" and user.target is operator.getitem else None
            if type(index) is not int or not 0 <= index < len(results) or index in picked:
                return None
            picked[index] = user
        return [self.name(picked[i]) if i in picked and picked[i].users else "_" for i in range(len(results))]

    def name(self, node: Node) -> str:
        """Return the variable of a node."""
        return self.names.setdefault(node, node.name)

    def write(self, node: Node) -> None:
        """Append the lines of one node."""
        if node.op == "placeholder":
            self.name(node)
        elif node.op == "get_attr":
            value: Any = self.gm
            for part in str(node.target).split("."):
                value = getattr(value, part)
            self.names[node] = self.bind(value, "constant")
        elif node.op == "output":
            self.lines.append(f"return {self.text(node.args[0])}")
        elif node.target is operator.getitem and (node in self.names or not node.users):
            self.free(node)  # unpacked already, or nobody's
        else:
            line, names = self.expression(node), self.unpacked(node)
            if names:
                line = f"{', '.join(names)}{',' * (len(names) == 1)} = {line}"
            elif node.users:
                line = f"{self.name(node)} = {line}"
            self.lines.append(line)
            self.free(node, names is not None and "_" in names)

    def free(self, node: Node, unused: bool = False) -> None:
        """Append the deletion of what is dead after a node, and of results that nobody picks."""
        dead = [self.names[x] for x in self.last_use.get(node, ()) if x in self.names]
        if unused:
            dead.append("_")
        if dead:
            self.lines.append(f"del {', '.join(dead)}")


def compile_graph(gm: GraphModule) -> Callable[..., Any]:
    """Return a function that runs a graph: positional inputs in the placeholders' order, the output as the graph has it.

    It checks nothing. Parameters and other tensors that the graph module holds are bound as objects: a later change in place
    shows, a replaced attribute does not. The source is in the function's attribute ``source``.
    """
    writer = _Writer(gm)
    for node in gm.graph.nodes:
        writer.write(node)
    inputs = ", ".join(writer.names[n] for n in gm.graph.nodes if n.op == "placeholder")
    body = "\n        ".join(writer.lines)
    source = f"def make({', '.join(writer.bound)}):\n    def run({inputs}):\n        {body}\n    return run\n"
    scope: dict[str, Any] = {}
    exec(compile(source, "<llmrt graph>", "exec"), scope)
    run: Callable[..., Any] = scope["make"](**writer.bound)
    run.source = source  # type: ignore[attr-defined]
    return run
