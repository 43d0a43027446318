"""Attention: torch's scaled-dot-product call, and the forms that models write out around a softmax, into one operator.

How models scale, cap, bias, mask and cast their scores differs in number and order of the steps, which no pattern says: the chain
from the softmax up to the product of queries and keys is read into `Scores`, the chain down to the product with the values is
followed, and both are replaced together. Nothing of a cache is copied: the operator reads the keys and values as they are, before
they are repeated for their groups of query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .. import ops
from .attention_scores import Unlike, combined, read_scores
from .attention_views import aligned, dense_last, may_equal, permuted, transposed, unbatched, unexpanded, ungrouped
from .matching import Miss
from .nodes import (
    VIEWS,
    arguments,
    aten,
    insert_call,
    is_call,
    is_written_between,
    known_equal,
    same_shape,
    size_of,
    val,
)
from .rewrite import GraphRewrite, RewriteReport

_attention = ops.attention.overload

#: [B, H, S, D] <-> [B, S, H, D].
SWAP = [0, 2, 1, 3]


def _only_user(node: Node) -> Node:
    if len(node.users) != 1:
        raise Unlike(f"{node.name} has {len(node.users)} users; expected 1")
    return next(iter(node.users))


def _between(node: Any, source: Node) -> list[Node]:
    """Return the calls that made `node` of `source`."""
    calls = []
    while node is not source and is_call(node, aten.to.dtype, *VIEWS):
        calls.append(node)
        node = node.args[0]
    return calls


def _heads(query: Node, key: Node, value: Node) -> tuple[Node, Node]:
    """Return keys and values [B, Hk, T, D] with as few heads as both have.

    Raises:
        Unlike: shapes or dtypes are not those of attention.
    """
    fewer = ungrouped(key), ungrouped(value)
    if known_equal(val(fewer[0]).shape[1], val(fewer[1]).shape[1]):
        key, value = fewer
    q, k, v = val(query), val(key), val(value)
    if k.dim() != 4 or v.dim() != 4 or q.dim() != 4:
        raise Unlike("query, key and value do not have four dimensions")
    heads, kv_heads = q.shape[1], k.shape[1]
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % kv_heads or v.shape[1] != kv_heads:
        raise Unlike(f"{heads} query heads do not divide among {kv_heads} key and {v.shape[1]} value heads")
    same = known_equal(q.shape[3], k.shape[3]) and may_equal(k.shape[2], v.shape[2])
    if not same or not all(may_equal(q.shape[0], x.shape[0]) for x in (k, v)):
        raise Unlike(f"shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)} are not those of attention")
    for x, name in ((key, "key"), (value, "value")):
        if not dense_last(x):
            raise Unlike(f"{name} {x.name} is not contiguous in its last dimension")
    if k.dtype != v.dtype or k.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Unlike(f"key has dtype {k.dtype}, value {v.dtype}")
    return key, value


def _mask(before: Node, mask: Node | None, query: Node, length: Any) -> Node | None:
    """Return a mask with four dimensions that the operator broadcasts by itself.

    Raises:
        Unlike: it does not fit.
    """
    if mask is None:
        return None
    mask = unexpanded(aligned(before, unexpanded(mask, length), None, 0), length)
    shape, (batch, heads, tokens, _) = val(mask).shape, val(query).shape
    expected = [(1, batch), (1, heads), (1, tokens), (length,)]
    if not all(any(may_equal(s, size) for size in sizes) for s, sizes in zip(shape, expected, strict=True)):
        raise Unlike(f"{mask.name} has shape {list(shape)}; expected 1 or {[batch, heads, tokens]}, {length}")
    return mask


def _put(
    last: Node,
    first: Node,
    operands: tuple[Node, Node, Node],
    scale: float,
    softcap: float,
    causal: bool,
    mask: Node | None,
) -> None:
    """Let the operator take the place of `last`, which gives [B, H, S, D].

    Raises:
        Unlike: an operand is written to between `first` and `last`, or the result is not the same.
    """
    query, key, value = operands
    if is_written_between(first, last, [x for x in (*operands, mask) if x is not None]):
        raise Unlike("an operand is written to in between")
    if val(query).dtype != val(key).dtype:
        query = insert_call(last, aten.to.dtype, query, val(key).dtype)
    length = size_of(last, key, 2)
    swapped = permuted(last, query, SWAP)
    result = insert_call(last, _attention, swapped, key, value, length, scale, causal, 0, softcap, mask)
    back = insert_call(last, aten.permute.default, result, SWAP)
    if not same_shape(val(back), val(last)) or val(back).dtype != val(last).dtype:
        raise Unlike(f"the result would be {val(back).dtype} {list(val(back).shape)}")
    for user in list(last.users):
        if is_call(user, aten.permute.default):
            user.replace_all_uses_with(permuted(user, back, user.args[1]))  # type: ignore[arg-type]
    last.replace_all_uses_with(back)


def _fuse_call(node: Node) -> None:
    """Replace torch's scaled_dot_product_attention."""
    query, key, value, mask, dropout, causal, scale, _ = arguments(node)
    if dropout:
        raise Unlike(f"dropout is {dropout}")
    width = val(query).shape[-1]
    if scale is None and not isinstance(width, int):
        raise Unlike("the width of a head is not known")
    if val(query).dtype != val(key).dtype:
        raise Unlike(f"query has dtype {val(query).dtype}, key {val(key).dtype}")
    key, value = _heads(query, key, value)
    tokens, length = val(query).shape[2], val(key).shape[2]
    if causal and (mask is not None or not known_equal(tokens, length)):
        raise Unlike(f"is_causal counts {tokens} queries from the first of {length} keys")
    mask = _mask(node, mask, query, length)
    first = min([node, *_between(node.args[1], key), *_between(node.args[2], value)])
    _put(node, first, (query, key, value), width**-0.5 if scale is None else scale, 0.0, causal, mask)


def _weighted(softmax: Node) -> tuple[Node, Node]:
    """Follow the weights to their product with the values; return the result [B, H, S, D] and the values [B, Hk, T, D].

    Raises:
        Unlike: the weights are used otherwise too, or something else happens to them.
    """
    weights, user = softmax, _only_user(softmax)
    while is_call(user, aten.to.dtype, aten.reshape.default):
        weights, user = user, _only_user(user)
    if not is_call(user, aten.matmul.default, aten.bmm.default) or user.args[0] is not weights:
        raise Unlike(f"the weights meet {user.target}; expected a product with values")
    value: Any = user.args[1]
    if val(user).dim() == 4 and val(value).dim() == 4:
        return user, value
    value = unbatched(value)
    result = _only_user(user)
    if value is None or not is_call(result, aten.reshape.default) or val(result).dim() != 4:
        raise Unlike(f"the heads of the values in {user.name} are not known")
    return result, value


def _fuse_softmax(node: Node, made: dict[Any, Node]) -> None:
    """Replace attention written out around a softmax."""
    source, dim = node.args[:2]
    if dim not in (-1, val(node).dim() - 1):
        raise Unlike(f"softmax over dimension {dim}")
    scores = read_scores(source)
    for call in scores.covered:
        if len(call.users) != 1:
            raise Unlike(f"{call.name} ({call.target}) is used {len(call.users)} times")
    last, values = _weighted(node)
    query = scores.query
    key = transposed(node, scores.keys)
    if key is None:
        raise Unlike(f"the heads of the keys {scores.keys.name} are not known")
    key, value = _heads(query, key, values)
    if val(query).dtype not in (val(key).dtype, torch.float32):
        raise Unlike(f"query has dtype {val(query).dtype}, key {val(key).dtype}")
    scale, softcap = scores.scale, 0.0
    if scores.cap is not None:
        scale, softcap = scores.scale * scores.cap, scores.cap
        if softcap <= 0:
            raise Unlike(f"the cap is {softcap}")
    length = val(key).shape[2]
    mask = combined(node, scores, val(query).shape[1], length, made)
    mask = _mask(node, mask, query, length)
    first = min([*scores.covered, *_between(scores.keys, key), *_between(values, value)])
    _put(last, first, (query, key, value), scale, softcap, False, mask)


def _try_all(gm: GraphModule, report: RewriteReport, name: str, target: Any, fuse: Callable[[Node], Any]) -> int:
    fired = 0
    for node in gm.graph.find_nodes(op="call_function", target=target):
        try:
            fuse(node)
            fired += 1
        except Unlike as reason:
            if val(node).dim() == 4:
                report.near(name, node, Miss(3, str(reason)), 3)
    gm.graph.eliminate_dead_code()
    return fired


def _calls(gm: GraphModule, report: RewriteReport) -> int:
    return _try_all(gm, report, "attention", aten.scaled_dot_product_attention.default, _fuse_call)


def _written_out(gm: GraphModule, report: RewriteReport) -> int:
    made: dict[Any, Node] = {}
    return _try_all(gm, report, "attention, written out", aten.softmax.int, lambda node: _fuse_softmax(node, made))


ATTENTION = (GraphRewrite("attention", _calls), GraphRewrite("attention, written out", _written_out))
