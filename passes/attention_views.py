"""What attention looks through on its operands: permutations, casts, and copies of key/value heads per group of queries."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .nodes import VIEWS, aten, insert_call, is_call, known_equal, size_of, val

_HALVES = (torch.bfloat16, torch.float16)


def may_equal(a: Any, b: Any) -> bool:
    """Return whether two sizes can be equal: those of two tensors are often equal without anything that says so.

    The operator checks them when it runs, as the calls do that it replaces.
    """
    return not statically_known_true(a != b)


def uncast(node: Node) -> Node:
    """Return what a cast from a 16-bit float to float32 was made from; the operator computes in float32 anyway."""
    if is_call(node, aten.to.dtype) and val(node).dtype == torch.float32 and val(node.args[0]).dtype in _HALVES:
        return node.args[0]  # type: ignore[return-value]
    return node


def permuted(before: Node, node: Node, order: list[int]) -> Node:
    """Return `node` with its dimensions in `order`, as one permutation (or none) of what it is a permutation of."""
    if is_call(node, aten.permute.default):
        order = [node.args[1][i] for i in order]  # type: ignore[index,misc]
        node = node.args[0]  # type: ignore[assignment]
    if order == list(range(len(order))):
        return node
    return insert_call(before, aten.permute.default, node, order)


def unbatched(node: Node) -> Node | None:
    """Return [B, H, T, D] of which `node` is the [B * H, T, D] view; or [B, Hk, T, D], if that repeats heads."""
    if not is_call(node, aten.reshape.default) or val(node).dim() != 3:
        return None
    source: Any = node.args[0]
    full, flat = val(source).shape, val(node).shape
    if not all(known_equal(full[i], flat[i]) for i in (-1, -2)) or not known_equal(math.prod(full[:-2]), flat[0]):
        return None
    if len(full) == 5 and is_call(source, aten.expand.default):
        single: Any = source.args[0]
        source = single.args[0] if is_call(single, aten.unsqueeze.default) and single.args[1] == 2 else single
        same = val(source).dim() == 4 and all(known_equal(val(source).shape[i], full[i]) for i in (0, 1, -2, -1))
        return source if same else None
    return source if len(full) == 4 else None


def transposed(before: Node, node: Node) -> Node | None:
    """Return the keys [B, Hk, T, D] of a factor [B, Hk, D, T], or those of [B * Hk, D, T]."""
    node = uncast(node)
    if val(node).dim() == 4:
        if is_call(node, aten.permute.default) and uncast(node.args[0]) is not node.args[0]:  # type: ignore[arg-type]
            return permuted(before, uncast(node.args[0]), [node.args[1][i] for i in (0, 1, 3, 2)])  # type: ignore[arg-type,index,misc]
        return permuted(before, node, [0, 1, 3, 2])
    if is_call(node, aten.permute.default) and node.args[1] == [0, 2, 1]:
        return unbatched(uncast(node.args[0]))  # type: ignore[arg-type]
    return None


def ungrouped(node: Node) -> Node:
    """Return the heads [B, Hk, T, D] that `node` [B, H, T, D] repeats H / Hk times each, or `node`."""
    node = uncast(node)
    if not is_call(node, aten.reshape.default) or not is_call(node.args[0], aten.expand.default):
        return node
    expanded: Any = node.args[0]
    single: Any = expanded.args[0]
    if not is_call(single, aten.unsqueeze.default) or single.args[1] != 2:
        return node
    source: Any = single.args[0]
    heads, all_heads, wide = val(source), val(node), val(expanded)
    if heads.dim() != 4 or all_heads.dim() != 4 or not known_equal(wide.shape[1], heads.shape[1]):
        return node
    fits = known_equal(all_heads.shape[1], heads.shape[1] * wide.shape[2])
    fits = fits and all(known_equal(heads.shape[i], all_heads.shape[i]) for i in (0, 2, 3))
    return source if fits else node


def dense_last(node: Node) -> bool:
    """Return whether the last dimension is contiguous when the graph runs.

    Views are followed to what they look at: the strides that were noted for them may stem from copies that are gone.
    """
    dim = val(node).dim() - 1
    while node.op == "call_function" and node.target in VIEWS:
        source: Any = node.args[0]
        if known_equal(val(node).shape[dim], 1):
            return True
        if node.target == aten.permute.default:
            dim = node.args[1][dim]  # type: ignore[index]
        elif node.target == aten.unsqueeze.default:
            dim -= dim > node.args[1]
        elif node.target == aten.select.int:
            dim += dim >= node.args[1]
        elif node.target == aten.expand.default:
            dim += val(source).dim() - val(node).dim()
            if dim < 0 or known_equal(val(source).shape[dim], 1):
                return False  # repeated
        elif node.target == aten.reshape.default:
            # a view's last dimension is the inner part of the source's, and a copy's is contiguous
            if dim != val(node).dim() - 1:
                return False
            dim = val(source).dim() - 1
        elif node.target != aten.slice.Tensor or (node.args[1] == dim and len(node.args) > 4):
            return False
        node = source
    x = val(node)
    return known_equal(x.stride(dim), 1) or known_equal(x.shape[dim], 1)


def aligned(before: Node, term: Node, rows: Any, heads: int) -> Node:
    """Return a term that broadcasts to scores [B, H, S, T] with four dimensions; [B * H, S or 1, T] is split.

    Args:
        before: where new calls go.
        term: 0 to 4 dimensions.
        rows: of the scores that the term was added to: None if these had four dimensions, else a node [B, H, S, D].
        heads: H.
    """
    x = val(term)
    if rows is not None and x.dim() == 3 and not known_equal(x.shape[0], 1):
        sizes = [size_of(before, rows, 0), heads, size_of(before, term, 1), size_of(before, term, 2)]
        return insert_call(before, aten.reshape.default, term, sizes)
    while val(term).dim() < 4:
        term = insert_call(before, aten.unsqueeze.default, term, 0)
    return term


def unexpanded(term: Node, length: Any) -> Node:
    """Return the source of an expanded mask where the operator broadcasts by itself: all but the last dimension."""
    while is_call(term, aten.expand.default):
        source: Any = term.args[0]
        x = val(source)
        if x.dim() != val(term).dim() or not known_equal(x.shape[-1], length):
            break
        term = source
    return term
