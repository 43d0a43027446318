"""Rotary position embedding whose rotated key goes to a key/value cache and nowhere else."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch.fx import GraphModule, Node

from .. import ops
from .matching import Miss
from .nodes import arguments, aten, insert_call, is_call, is_mutable, is_written_between, may_share_memory, replace, val
from .rewrite import GraphRewrite, RewriteReport

NAME = "rope_append"
_rope, _kv_append, _rope_append = ops.rope.overload, ops.kv_append.overload, ops.rope_append.overload


def _without_permutes(node: Node) -> Node | None:
    """Return the tensor that permutations lead back to, if together they change nothing."""
    order = list(range(val(node).dim()))
    while is_call(node, aten.permute.default):
        inner: list[int] = node.args[1]  # type: ignore[assignment]
        order = [inner[i] for i in order]
        node = node.args[0]  # type: ignore[assignment]
    return node if order == sorted(order) else None


def _rotation(append: Node) -> Node | None:
    """Return the rope whose key, and all of it, a kv_append stores."""
    key = _without_permutes(arguments(append)[2])
    if key is None or not is_call(key, operator.getitem) or key.args[1] != 1 or not is_call(key.args[0], _rope):
        return None
    return key.args[0]  # type: ignore[return-value]


def _views(node: Node) -> Iterator[Node]:
    """Yield a node, and all views of it."""
    yield node
    for user in node.users:
        if may_share_memory(user) and user.args[0] is node and not is_mutable(user):
            yield from _views(user)


def _held(rope: Node, index: int) -> list[Node]:
    """Return the nodes that hold one result of rope, in the graph's order."""
    return sorted({view for part in rope.users if part.args[1] == index for view in _views(part)})


def _obstacle(rope: Node, append: Node) -> str | None:
    """Return why rope cannot take place where kv_append stands, or None."""
    query, key = _held(rope, 0), _held(rope, 1)
    if other := [u for part in key for u in part.users if u is not append and u not in key]:
        return f"the rotated key is used by {other[0].name} too"
    if arguments(append)[3] in key:
        return "the rotated key is stored as the value too"
    if early := [u for part in query for u in part.users if u < append and u not in query]:
        return f"the rotated query is used by {early[0].name} before the key is stored"
    if is_written_between(rope, append, rope.all_input_nodes):
        return "an input is written to in between"
    return None


def _replace(rope: Node, append: Node) -> None:
    key_cache, value_cache, _, value, *where, counter = arguments(append)
    query, key, cos, sin, *options = arguments(rope)
    operands = (query, key, value, cos, sin, key_cache, value_cache)
    rotated = insert_call(append, _rope_append, *operands, *where, *options, counter)
    for part in _held(rope, 0):
        if part < append:
            append.prepend(part)
    rotated_key = _held(rope, 1)
    for part in [p for p in rope.users if p.args[1] == 0]:
        replace(part, rotated)
    for node in (append, *reversed(rotated_key), rope):
        node.graph.erase_node(node)


def rotate_and_append(gm: GraphModule, report: RewriteReport) -> int:
    """Replace rope and the kv_append of its key by rope_append; return how many."""
    fired = 0
    for append in gm.graph.find_nodes(op="call_function", target=_kv_append):
        rope = _rotation(append)
        if rope is None:
            continue
        reason = _obstacle(rope, append)
        if reason is None:
            _replace(rope, append)
            fired += 1
        else:
            report.near(NAME, append, Miss(3, reason), 3)
    return fired


ROPE_APPENDS = (GraphRewrite(NAME, rotate_and_append),)
