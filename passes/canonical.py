"""Bringing a graph into one spelling, so that one pattern per fusion suffices.

What does nothing vanishes (views to the same shape, expands that expand nothing, casts there and back, contiguous, dropout of
probability 0, autocast regions that are off); views, permutations and parts of a tensor have one operator each; equal views are
made once. Nothing here changes a result: the only liberty is that a tensor may be a view where the model made a copy, and only
if nothing in the graph writes to either.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .nodes import (
    VIEWS,
    arguments,
    aten,
    fill_constants,
    insert_call,
    is_call,
    is_known_contiguous,
    is_mutable,
    known_equal,
    mutated_roots,
    named_arguments,
    replace,
    same_shape,
    size_of,
    storage_root,
    val,
)

END = sys.maxsize
Form = Callable[[Node], Any]
#: target -> function that returns the node to use instead, or None to leave the call as it is.
FORMS: dict[Any, Form] = {}


def form(*targets: Any) -> Callable[[Form], Form]:
    """Register a function for calls of these targets."""

    def register(function: Form) -> Form:
        FORMS.update(dict.fromkeys(targets, function))
        return function

    return register


def _axis(node: Node, dim: int, extra: int = 0) -> int:
    return dim if dim >= 0 else dim + val(node).dim() + extra


def _holds(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Return whether every value of one dtype is a value of the other."""
    return torch.promote_types(narrow, wide) == wide


@form(aten.alias.default, aten.detach.default, aten.detach_.default, aten.lift_fresh.default)
def _same(node: Node) -> Any:
    return node.args[0]


@form(aten.contiguous.default, aten.clone.default, aten.lift_fresh_copy.default)
def _copy(node: Node) -> Any:
    if any(user.op == "output" for user in node.users):
        return None  # callers may rely on the strides
    return node.args[0]


@form(aten.dropout.default)
def _dropout(node: Node) -> Any:
    x, p, train = arguments(node)
    return x if not train or p == 0 else None


@form(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default)
def _cast(node: Node) -> Any:
    x: Any = node.args[0]
    old, new = val(x), val(node)
    if old.device != new.device or old.layout != new.layout:
        return None
    if is_call(x, aten.to.dtype) and _holds(val(x.args[0]).dtype, old.dtype):
        x = x.args[0]
        old = val(x)
    if old.dtype == new.dtype:
        return x
    plain = node.target == aten.to.dtype and node.args == (x, new.dtype) and not node.kwargs
    return None if plain else insert_call(node, aten.to.dtype, x, new.dtype)


@form(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.view_as.default, aten.reshape_as.default,
      aten.flatten.using_ints, aten.unflatten.int)  # fmt: skip
def _reshape(node: Node) -> Any:
    x: Any = node.args[0]
    if is_call(x, aten.reshape.default):
        x = x.args[0]
    if same_shape(val(x), val(node)):
        return x
    if node.target in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
        shape = [s if isinstance(s, Node) else int(s) for s in node.args[1]]  # type: ignore[union-attr,arg-type]
    else:
        source: Any = node.args[1] if node.target in (aten.view_as.default, aten.reshape_as.default) else None
        symbolic = [i for i, s in enumerate(val(node).shape) if not isinstance(s, int)]
        if source is not None:
            shape = [size_of(node, source, i) for i in range(val(source).dim())]
        elif len(symbolic) <= 1:
            shape = [s if isinstance(s, int) else -1 for s in val(node).shape]
        else:
            shape = _symbolic_shape(node, x)
    known = [s if not isinstance(s, Node) else -2 for s in shape]
    for i, size in enumerate(val(node).shape):
        if isinstance(size, int) and known[i] == -1:
            shape[i] = size
    if node.target == aten.reshape.default and node.args == (x, shape):
        return None
    return insert_call(node, aten.reshape.default, x, shape)


def _symbolic_shape(node: Node, x: Node) -> list[Any]:
    """Return the shape of flatten or unflatten: sizes that stay are read from the source, the changed ones follow."""
    source: Any = node.args[0]
    rank, full = val(source).dim(), arguments(node)
    if node.target == aten.flatten.using_ints:
        start, end = (d % rank for d in full[1:3])
        middle: list[Any] = [-1]
    else:
        start = end = full[1] % rank
        middle = list(full[2])
    before = [size_of(node, source, i) for i in range(start)]
    return before + middle + [size_of(node, source, i) for i in range(end + 1, rank)]


@form(aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default, aten.numpy_T.default, aten.movedim.int,
      aten.swapaxes.default)  # fmt: skip
def _permute(node: Node) -> Any:
    x: Any = node.args[0]
    rank = val(x).dim()
    order = list(range(rank))
    if node.target == aten.permute.default:
        order = [_axis(x, d) for d in node.args[1]]  # type: ignore[union-attr,arg-type]
    elif node.target == aten.movedim.int:
        moved = order.pop(_axis(x, node.args[1]))  # type: ignore[arg-type]
        order.insert(_axis(x, node.args[2]), moved)  # type: ignore[arg-type]
    elif node.target == aten.numpy_T.default:
        order.reverse()
    elif rank >= 2:
        pair = (rank - 2, rank - 1) if len(node.args) == 1 else node.args[1:3]
        a, b = (_axis(x, d) for d in pair)  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    if is_call(x, aten.permute.default):
        order = [x.args[1][i] for i in order]
        x = x.args[0]
    if order == list(range(rank)):
        return x
    if node.target == aten.permute.default and node.args == (x, order):
        return None
    return insert_call(node, aten.permute.default, x, order)


@form(aten.unsqueeze.default)
def _unsqueeze(node: Node) -> Any:
    x, dim = arguments(node)
    return None if dim >= 0 else insert_call(node, aten.unsqueeze.default, x, _axis(x, dim, 1))


@form(aten.expand.default, aten.broadcast_to.default)
def _expand(node: Node) -> Any:
    if same_shape(val(node.args[0]), val(node)):
        return node.args[0]
    if node.target == aten.expand.default:
        return None
    return insert_call(node, aten.expand.default, *node.args)


@form(aten.repeat.default)
def _repeat(node: Node) -> Any:
    x, repeats = arguments(node)
    once = all(isinstance(n, int) and n == 1 for n in repeats)
    return x if once and same_shape(val(x), val(node)) else None


@form(aten.repeat_interleave.self_int)
def _interleave(node: Node) -> Any:
    x, repeats, dim, _ = arguments(node)
    if dim is None or (dim >= 0 and len(node.args) == 3 and not node.kwargs):
        return None
    return insert_call(node, aten.repeat_interleave.self_int, x, repeats, _axis(x, dim))


@form(aten.stack.default)
def _stack(node: Node) -> Any:
    parts, dim = arguments(node)
    return None if dim >= 0 else insert_call(node, aten.stack.default, parts, _axis(parts[0], dim, 1))


@form(aten.slice.Tensor)
def _slice(node: Node) -> Any:
    x, dim, start, end, step = arguments(node)
    dim, size = _axis(x, dim), val(x).shape[_axis(x, dim)]
    if known_equal(val(node).shape[dim], size) and step == 1:
        return x
    start = 0 if start is None else start
    if isinstance(size, int):
        if isinstance(start, int) and start < 0:
            start = max(0, start + size)
        if end is None or (isinstance(end, int) and end > size):
            end = size
        elif isinstance(end, int) and end < 0:
            end = max(0, end + size)
    end = END if end is None else end
    full = (x, dim, start, end, *([step] if step != 1 else []))
    if tuple(node.args) == full and not node.kwargs:
        return None
    return insert_call(node, aten.slice.Tensor, *full)


@form(aten.narrow.default)
def _narrow(node: Node) -> Any:
    x, dim, start, length = arguments(node)
    if not all(isinstance(v, int) for v in (start, length)) or start < 0:
        return None
    return insert_call(node, aten.slice.Tensor, x, _axis(x, dim), start, start + length)


@form(aten.select.int)
def _select(node: Node) -> Any:
    x, dim, index = arguments(node)
    return None if dim >= 0 else insert_call(node, aten.select.int, x, _axis(x, dim), index)


@form(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.tensor_split.sections, aten.unbind.int)
def _parts(node: Node) -> Any:
    full = arguments(node)
    x, dim = full[0], _axis(full[0], full[-1])
    if not all(is_call(user, operator.getitem) for user in node.users):
        return None
    whole = node.target == aten.unbind.int
    sizes = [1 if whole else part.shape[dim] for part in val(node)]
    if not all(isinstance(s, int) for s in sizes):
        return None
    for user in list(node.users):
        index: Any = user.args[1]
        start = sum(sizes[: index % len(sizes)])
        if whole:
            part = insert_call(user, aten.select.int, x, dim, start)
        else:
            part = insert_call(user, aten.slice.Tensor, x, dim, start, start + sizes[index])
        replace(user, part)
    return None


@form(aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar, aten.sub.Scalar)
def _scalar(node: Node) -> Any:
    tensor = getattr(getattr(aten, node.target._opname), "Tensor")  # type: ignore[union-attr]  # noqa: B009
    new = insert_call(node, tensor, *node.args, **node.kwargs)
    return _neutral(new) or new


@form(aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)
def _neutral(node: Node) -> Any:
    a, b = node.args[:2]
    if node.target == aten.mul.Tensor:
        if a is b:
            return insert_call(node, aten.pow.Tensor_Scalar, a, 2)
        if not isinstance(a, Node) and isinstance(b, Node):
            return insert_call(node, aten.mul.Tensor, b, a)
    one = node.target in (aten.mul.Tensor, aten.div.Tensor)
    if isinstance(a, Node) and not isinstance(b, Node) and b == (1 if one else 0) and val(a).dtype == val(node).dtype:
        return a
    return None


@form(aten.square.default)
def _square(node: Node) -> Any:
    return insert_call(node, aten.pow.Tensor_Scalar, node.args[0], 2)


@form(aten.pow.Tensor_Scalar)
def _power(node: Node) -> Any:
    x, exponent = node.args
    if exponent == -0.5:
        return insert_call(node, aten.rsqrt.default, x)
    whole = isinstance(exponent, float) and exponent == int(exponent)
    return insert_call(node, aten.pow.Tensor_Scalar, x, int(exponent)) if whole else None  # type: ignore[arg-type]


@form(aten.reciprocal.default)
def _reciprocal(node: Node) -> Any:
    x: Any = node.args[0]
    return insert_call(node, aten.rsqrt.default, x.args[0]) if is_call(x, aten.sqrt.default) else None


@form(aten.cat.default)
def _cat(node: Node) -> Any:
    parts: Any = node.args[0]
    full = [p for p in parts if not any(known_equal(s, 0) for s in val(p).shape)] or parts[:1]
    if len(full) == 1 and val(full[0]).dtype == val(node).dtype:
        return full[0]
    dim = _axis(full[0], arguments(node)[1])
    return None if tuple(node.args) == (full, dim) else insert_call(node, aten.cat.default, full, dim)


#: Casts that return their argument itself where it has the dtype asked for, unless they are told to copy.
_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default}


def _is_argument(node: Node, new: Node) -> bool:
    """Return whether a cast or ``contiguous`` gives its very argument, not a copy of it."""
    if new is not node.args[0]:
        return False
    options = named_arguments(node)
    layout = options.get("memory_format")
    if node.target == aten.contiguous.default:
        return layout == torch.contiguous_format and is_known_contiguous(val(new))
    return node.target in _CASTS and not options.get("copy") and layout is None


def _may_replace(node: Node, new: Node, mutated: set[Node]) -> bool:
    """Return whether a result may share the memory of `new` from now on (or did so before)."""
    if node.target in (aten.alias.default, aten.detach.default, aten.detach_.default) or node.target in VIEWS:
        return True
    if _is_argument(node, new):
        return True
    return storage_root(node) not in mutated and storage_root(new) not in mutated


#: Elementwise calls that write to their first argument -> the ones that make a new tensor.
_FUNCTIONAL = {
    getattr(getattr(aten, f"{name}_"), overload): getattr(getattr(aten, name), overload)
    for name, overload in (
        ("add", "Tensor"), ("sub", "Tensor"), ("mul", "Tensor"), ("div", "Tensor"), ("relu", "default"),
        ("silu", "default"), ("gelu", "default"), ("tanh", "default"), ("masked_fill", "Scalar"),
    )
}  # fmt: skip


def _functionalize(gm: GraphModule) -> None:
    """Replace writes to fresh intermediate tensors that have no other name (``x += y``) by new tensors."""
    for node in list(gm.graph.nodes):
        functional = _FUNCTIONAL.get(node.target)
        if functional is None:
            continue
        target: Any = node.args[0]
        if target.op != "call_function" or storage_root(target) is not target or is_mutable(target):
            continue
        if any(user is not node and storage_root(user) is target for user in target.users):
            continue
        new = insert_call(node, functional, *node.args, **node.kwargs)
        if not same_shape(val(new), val(target)) or val(new).dtype != val(target).dtype:
            gm.graph.erase_node(new)
            continue
        replace(node, new)
        _use_from_here(target, new)


def _use_from_here(old: Node, new: Node) -> None:
    """Let the users of `old` that come after `new` use `new`."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user > new)


def _without_regions(gm: GraphModule) -> None:
    """Drop autocast regions that are off, if none is on around the graph, and switches of grad mode to what it is."""
    for node in list(gm.graph.nodes):
        name = getattr(node.target, "__name__", "")
        if name == "_exit_autocast":
            enter = node.args[0]
            if enter.args[2] is False and not torch.is_autocast_enabled(enter.args[0]):
                gm.graph.erase_node(node)
                if not enter.users:
                    gm.graph.erase_node(enter)
        elif name == "_set_grad_enabled" and node.args[0] is False and not torch.is_grad_enabled():
            gm.graph.erase_node(node)


#: Calls that make a tensor and are worth sharing: layers repeat them on what they have in common.
SHARED = {aten.to.dtype, aten.repeat_interleave.self_int, aten.cos.default, aten.sin.default}


def _share_views(gm: GraphModule, mutated: set[Node]) -> None:
    """Let equal views, casts and tables be made once."""
    seen: dict[Any, Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or (node.target not in VIEWS and node.target not in SHARED):
            continue
        if node.target in (*SHARED, aten.reshape.default) and storage_root(node) in mutated:
            continue  # it may be a copy
        key = (node.target, str(node.args), str(node.kwargs))  # names of nodes are unique
        if key in seen:
            replace(node, seen[key])
        else:
            seen[key] = node


def canonicalize(gm: GraphModule) -> None:
    """Bring a graph of ATen operators into the one spelling, in place; `recompile` is the caller's, for a graph that will run."""
    fill_constants(gm)
    _functionalize(gm)
    _without_regions(gm)
    mutated = mutated_roots(gm.graph)
    for node in list(gm.graph.nodes):
        while node.op == "call_function" and (function := FORMS.get(node.target)) is not None:
            new = function(node)
            if new is None or not _may_replace(node, new, mutated):
                break
            replace(node, new)
            node = new
    _share_views(gm, mutated)
    gm.graph.eliminate_dead_code()
