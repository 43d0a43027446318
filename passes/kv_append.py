"""Writing to a key/value cache: two ``index_copy_`` at the same positions, which a counter in memory may give."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from .. import ops
from .matching import Miss
from .nodes import (
    arguments,
    aten,
    has_dense_rows,
    insert_call,
    is_call,
    is_mutable,
    is_read_between,
    is_written_between,
    known_equal,
    mutated_arguments,
    named_arguments,
    replace,
    storage_root,
    val,
)
from .rewrite import GraphRewrite, RewriteReport

NAME = "kv_append"
_INDEX_COPY = aten.index_copy_.default
_ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_SWAP = [0, 2, 1, 3]


def _tokens_first(before: Node, tokens: Node) -> Node:
    """Return [B, Hk, S, D] as [B, S, Hk, D]."""
    if is_call(tokens, aten.permute.default) and tokens.args[1] == _SWAP:
        return tokens.args[0]  # type: ignore[return-value]
    return insert_call(before, aten.permute.default, tokens, _SWAP)


def _is_cache_update(node: Node) -> bool:
    """Return whether an ``index_copy_`` writes [B, Hk, S, D] to S places of [B, Hk, C, D]."""
    cache, dim, positions, tokens = arguments(node)
    x = val(cache)
    if x.dim() != 4 or dim % 4 != 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return val(positions).dim() == 1 and val(positions).dtype == torch.int64 and val(tokens).dim() == 4


def _partner(keys: Node) -> Node | None:
    """Return the next update at the same positions, of another cache."""
    for values in keys.graph.find_nodes(op="call_function", target=_INDEX_COPY):
        if keys < values and values.args[2] is keys.args[2] and storage_root(values) is not storage_root(keys):
            return values if _is_cache_update(values) else None
    return None


def _obstacle(keys: Node, values: Node) -> str | None:
    """Return why two updates cannot be made where the second one stands, or None."""
    caches = [val(keys), val(values)]
    if caches[0].dtype != caches[1].dtype:
        return f"the caches have dtypes {caches[0].dtype} and {caches[1].dtype}"
    if not all(known_equal(a, b) for a, b in zip(caches[0].shape[:3], caches[1].shape[:3], strict=True)):
        return f"the caches have shapes {list(caches[0].shape)} and {list(caches[1].shape)}"
    if not all(has_dense_rows(cache) for cache in caches):
        return "the last dimension of a cache is not contiguous"
    key_cache, _, positions, key = arguments(keys)
    if is_read_between(keys, values, [key_cache]):
        return "a cache is used before the other one is written"
    if is_written_between(keys.next, values, [key, positions]):
        return "new tokens or positions are written to in between"
    return None


def _counter(positions: Node) -> Node | None:
    """Return the tensor of one number n where `positions` are n, n + 1, ..."""
    if not is_call(positions, aten.add.Tensor) or positions.kwargs:
        return None
    for places, counter in (positions.args, positions.args[::-1]):
        if not isinstance(places, Node) or not isinstance(counter, Node) or not is_call(places, *_ARANGES):
            continue
        options = named_arguments(places)
        one = isinstance(val(counter), torch.Tensor) and known_equal(val(counter).numel(), 1)
        from_zero = options.get("start", 0) == 0 and options.get("step", 1) == 1
        if one and from_zero and val(counter).dtype == val(places).dtype == torch.int64:
            return counter
    return None


def _advance(positions: Node, counter: Node, append: Node) -> Node | str:
    """Return the call that adds the number of new tokens to the counter, if `append` can do that, or what hinders it."""
    root, node = storage_root(counter), positions.next
    while not (is_mutable(node) and any(storage_root(x) is root for x in mutated_arguments(node))):
        if node.op == "output":
            return "the counter is not advanced"
        node = node.next
    tokens = val(positions).shape[0]
    plain = is_call(node, aten.add_.Tensor) and node.args[0] is counter and not node.kwargs
    if not plain or not known_equal(val(node.args[1]), tokens):
        return f"{node.name} does not add the number of new tokens to the counter"
    if is_read_between(min(node, append), max(node, append), [counter]):
        return "the counter is used between its change and the update of the caches"
    return node


def _replace(keys: Node, values: Node, report: RewriteReport) -> None:
    key_cache, _, positions, key = arguments(keys)
    value_cache, _, _, value = arguments(values)
    where: dict[str, Node] = {"positions": positions}
    counter = _counter(positions)
    if counter is not None:
        advance = _advance(positions, counter, values)
        if isinstance(advance, Node):
            where = {"counter": counter}
            replace(advance, counter)
        else:
            report.near(NAME, positions, Miss(3, f"positions stay: {advance}"), 3)
    new = (_tokens_first(values, key), _tokens_first(values, value))
    insert_call(values, ops.kv_append.overload, key_cache, value_cache, *new, 0, 1, **where)
    replace(keys, key_cache)
    replace(values, value_cache)


def append(gm: GraphModule, report: RewriteReport) -> int:
    """Replace pairs of ``index_copy_`` by kv_append, and what advances their counter; return how many."""
    fired = 0
    for keys in gm.graph.find_nodes(op="call_function", target=_INDEX_COPY):
        if keys._erased or not _is_cache_update(keys):
            continue
        values = _partner(keys)
        reason = "no second cache is written at the same positions" if values is None else _obstacle(keys, values)
        if values is None or reason is not None:
            report.near(NAME, keys, Miss(3, str(reason)), 3)
            continue
        _replace(keys, values, report)
        fired += 1
    return fired


APPENDS = (GraphRewrite(NAME, append),)
