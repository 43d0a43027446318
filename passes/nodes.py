"""What rewrites ask of graph nodes: values, storage, order; and how they make new ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten

#: Operators whose result may share memory with their first argument beyond what their schema says.
_MAY_ALIAS = {aten.reshape.default, aten.contiguous.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout}

#: Operators that read the sizes of a tensor only.
_SIZES = {aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default}

#: Operators that move no data (or need not): views, and what becomes one.
VIEWS = {
    aten.reshape.default, aten.view.default, aten.permute.default, aten.slice.Tensor, aten.select.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.transpose.int,
}  # fmt: skip


def val(node: Any) -> Any:
    """Return the fake tensor, symbolic number or Python value that an argument stands for."""
    return node.meta["val"] if isinstance(node, Node) else node


def known_equal(a: Any, b: Any) -> bool:
    """Return whether two sizes, symbolic or not, are equal for every input, without adding a guard."""
    return statically_known_true(a == b)


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two fake tensors have equal shapes for every input, without adding a guard."""
    return a.dim() == b.dim() and all(known_equal(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def is_call(node: Any, *targets: Any) -> bool:
    """Return whether the argument is a node that calls one of the targets."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def arguments(node: Node) -> list[Any]:
    """Return all arguments of an operator call in the schema's order, defaults filled in; of other calls what was given."""
    if not hasattr(node.target, "_schema"):
        return [*node.args, *node.kwargs.values()]
    full = []
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            full.append(node.args[i])
        else:
            full.append(node.kwargs.get(argument.name, argument.default_value))
    return full


def named_arguments(node: Node) -> dict[str, Any]:
    """Return all arguments of an operator call by name, defaults filled in."""
    return {a.name: v for a, v in zip(node.target._schema.arguments, arguments(node), strict=True)}  # type: ignore[union-attr]


def fake_mode_of(graph: Graph) -> FakeTensorMode | None:
    """Return the mode of the graph's fake tensors."""
    for node in graph.nodes:
        flat, _ = tree_flatten(node.meta.get("val"))
        for value in flat:
            if isinstance(value, FakeTensor):
                return value.fake_mode
    return None


def fill_constants(gm: GraphModule) -> None:
    """Give tensors that the module holds (get_attr) their fake values."""
    mode = fake_mode_of(gm.graph)
    for node in gm.graph.find_nodes(op="get_attr"):
        if "val" not in node.meta:
            value: Any = gm
            for part in str(node.target).split("."):
                value = getattr(value, part)
            fake = isinstance(value, torch.Tensor) and mode is not None and not isinstance(value, FakeTensor)
            node.meta["val"] = mode.from_tensor(value, static_shapes=True) if fake and mode is not None else value


def infer(node: Node, mode: FakeTensorMode | None) -> Any:
    """Return what a call gives for the fake values of its arguments; also noted in ``node.meta["val"]``."""
    args, kwargs = tree_map_only(Node, val, (node.args, node.kwargs))
    if mode is None:
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    else:
        with mode, enable_python_dispatcher():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
    node.meta["val"] = result
    return result


def insert_call(before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Insert a call before a node and infer its value."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    infer(node, fake_mode_of(before.graph))
    return node


def size_of(before: Node, tensor: Node, dim: int) -> int | Node:
    """Return a size as an argument for a node that comes at `before`: a number, or a node that computes it."""
    size = val(tensor).shape[dim]
    return size if isinstance(size, int) else insert_call(before, aten.sym_size.int, tensor, dim)


def replace(old: Node, new: Node) -> None:
    """Let every user of `old` use `new`, and drop `old`."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def is_mutable(node: Node) -> bool:
    """Return whether the call writes to an argument."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def mutated_arguments(node: Node) -> Iterator[Node]:
    """Yield the arguments that a call writes to."""
    for argument, value in zip(node.target._schema.arguments, arguments(node), strict=True):  # type: ignore[union-attr]
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Node):
            yield value


def may_share_memory(node: Node) -> bool:
    """Return whether the result of a call may be a view of its first argument."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target in _MAY_ALIAS or "getitem" in getattr(node.target, "__name__", ""):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def storage_root(node: Node) -> Node:
    """Return the node whose memory a node may be a view of: an input, a constant or a call that makes a new tensor."""
    while may_share_memory(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def mutated_roots(graph: Graph) -> set[Node]:
    """Return the roots of all memory that the graph writes to."""
    return {storage_root(x) for node in graph.nodes if is_mutable(node) for x in mutated_arguments(node)}


def is_written_between(first: Node, last: Node, inputs: list[Node]) -> bool:
    """Return whether a call after `first` and before `last` writes to memory of one of the inputs."""
    roots = {storage_root(x) for x in inputs}
    node = first
    while node is not last and node.op != "output":
        if is_mutable(node) and any(storage_root(x) in roots for x in mutated_arguments(node)):
            return True
        node = node.next
    return False


def is_read_between(first: Node, last: Node, inputs: list[Node]) -> bool:
    """Return whether something after `first` and before `last` uses memory of one of the inputs, other than by a view of it."""
    roots = {storage_root(x) for x in inputs}
    node = first.next
    while node is not last:
        view = may_share_memory(node) and node.target not in _MAY_ALIAS and not is_mutable(node)
        if not view and node.target not in _SIZES and any(storage_root(x) in roots for x in node.all_input_nodes):
            return True
        node = node.next
    return False


def has_dense_rows(tensor: torch.Tensor) -> bool:
    """Return whether the elements of a fake tensor's last dimension are contiguous for every input."""
    return known_equal(tensor.stride(-1), 1) or known_equal(tensor.shape[-1], 1)


def is_known_contiguous(tensor: torch.Tensor) -> bool:
    """Return whether a fake tensor is contiguous for every input, without adding a guard."""
    expected: Any = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not known_equal(stride, expected) and not known_equal(size, 1):
            return False
        expected = expected * size
    return True
