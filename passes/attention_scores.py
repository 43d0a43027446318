"""What models do to the products of queries and keys on the way to the softmax, read from the graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from .attention_views import aligned, unbatched, uncast, unexpanded
from .nodes import arguments, aten, insert_call, is_call, known_equal, val

#: Fills above this do not surely take a token's weight to 0, as adding them does.
HIDDEN = -9999.0


class Unlike(Exception):
    """Why a subgraph is not attention as the operator computes it."""


@dataclass(frozen=True)
class Step:
    """A term added to the scores, or a number that they are set to where a bool tensor says so.

    Attributes:
        term: what is added, [B or 1, H or 1, S or 1, T], fewer dimensions, or [B * H or 1, S or 1, T] if `flat`.
        factor: of the term.
        fill: None, or the number; the term is then a bool tensor.
        where: the value of the bool tensor that hides.
        flat: the scores had the shape [B * H, S, T] then.
    """

    term: Node
    factor: float = 1.0
    fill: float | None = None
    where: bool = True
    flat: bool = False


@dataclass
class Scores:
    """scale * query @ key^T, capped, and the steps after that, first to last.

    Attributes:
        query: [B, H, S, D].
        keys: the second factor, [B, Hk, D, T] or [B * H, D, T].
        scale: of the products.
        cap: None, or c of c * tanh(scale / c * product).
        steps: what is added and hidden.
        covered: the calls that compute all this.
    """

    query: Node
    keys: Node
    scale: float = 1.0
    cap: float | None = None
    steps: list[Step] = field(default_factory=list)
    covered: list[Node] = field(default_factory=list)

    def multiply(self, factor: float) -> None:
        """Multiply everything so far."""
        if self.cap is None:
            self.scale *= factor
        else:
            self.cap *= factor
        self.steps = [
            Step(s.term, s.factor * factor, None if s.fill is None else s.fill * factor, s.where, s.flat)
            for s in self.steps
        ]

    def bound(self) -> None:
        """Apply tanh."""
        if self.cap is not None or self.steps:
            raise Unlike("tanh stands after a mask or another tanh")
        self.cap = 1.0


def _number(x: Any) -> float | None:
    """Return the value of a number, or of a tensor that is one everywhere."""
    if isinstance(x, (int, float)):
        return float(x)
    if is_call(x, aten.full.default, aten.scalar_tensor.default):
        return _number(x.args[-1])
    if isinstance(x, Node) and x.op == "get_attr":
        value: Any = x.graph.owning_module
        for part in str(x.target).split("."):
            value = getattr(value, part, None)
        if type(value) in (torch.Tensor, torch.nn.Parameter) and value.numel() == 1:
            return float(value)
    return None


def read_scores(node: Any) -> Scores:
    """Read the scores that `node` [B, H, S, T] or [B * H, S, T] holds.

    Raises:
        Unlike: they are no products of queries and keys, or something happens to them that the operator cannot do.
    """
    if not isinstance(node, Node) or node.op != "call_function":
        raise Unlike(f"{node} is no product of queries and keys")
    if is_call(node, aten.matmul.default, aten.bmm.default, aten.baddbmm.default):
        scores = _product(node)
    elif is_call(node, aten.add.Tensor):
        scores = _sum(node)
    elif is_call(node, aten.mul.Tensor, aten.div.Tensor):
        scores = _scaled(node)
    elif is_call(node, aten.tanh.default):
        scores = read_scores(node.args[0])
        scores.bound()
    elif is_call(node, aten.to.dtype, aten.reshape.default):
        scores = read_scores(node.args[0])
        _check_rows(node)
    elif is_call(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.ScalarOther, aten.where.self):
        scores = _filled(node)
    else:
        raise Unlike(f"{node.name} is {node.target}, which the operator does not do to scores")
    scores.covered.append(node)
    return scores


def _check_rows(node: Node) -> None:
    """Allow casts between floats and [B * H, S, T] <-> [B, H, S, T]."""
    old, new = val(node.args[0]), val(node)
    if not old.is_floating_point() or not new.is_floating_point():
        raise Unlike(f"{node.name} has dtype {new.dtype}")
    if node.target == aten.reshape.default and not all(known_equal(old.shape[i], new.shape[i]) for i in (-1, -2)):
        raise Unlike(f"{node.name} has shape {list(new.shape)}, made from {list(old.shape)}")


def _product(node: Node) -> Scores:
    added = node.target == aten.baddbmm.default
    query, keys = node.args[1:3] if added else node.args[:2]
    query = uncast(query)  # type: ignore[arg-type]
    scores = Scores(query, keys)  # type: ignore[arg-type]
    if val(query).dim() == 3:
        full = unbatched(query)
        if full is None:
            raise Unlike(f"the heads of {query.name} {list(val(query).shape)} are not known")
        scores.query = uncast(full)
    elif val(query).dim() != 4:
        raise Unlike(f"{query.name} has {val(query).dim()} dimensions; expected [B, H, S, D]")
    if added:
        beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
        scores.multiply(float(alpha))  # type: ignore[arg-type]
        if beta != 0:
            scores.steps.append(Step(node.args[0], float(beta), flat=True))  # type: ignore[arg-type]
    return scores


def _either(a: Any, b: Any) -> tuple[Scores, Any]:
    """Read the scores that one of two operands holds; return them and the other operand."""
    try:
        return read_scores(a), b
    except Unlike as first:
        try:
            return read_scores(b), a
        except Unlike:
            raise first from None


def _sum(node: Node) -> Scores:
    a, b, alpha = arguments(node)
    if alpha != 1:
        raise Unlike(f"{node.name} adds with alpha {alpha}")
    scores, term = _either(a, b)
    if not isinstance(term, Node) or not isinstance(val(term), torch.Tensor):
        if isinstance(term, (int, float)):
            return scores  # the softmax does not see it
        raise Unlike(f"{node.name} adds {term}")
    scores.steps.append(Step(term, flat=val(node).dim() == 3))
    return scores


def _scaled(node: Node) -> Scores:
    a, b = node.args[:2]
    factor = _number(b)
    if factor is None and node.target == aten.mul.Tensor:
        a, factor = b, _number(a)
    if factor is None or factor == 0:
        raise Unlike(f"{node.name} scales by a tensor")
    scores = read_scores(a)
    scores.multiply(factor if node.target == aten.mul.Tensor else 1 / factor)
    return scores


def _filled(node: Node) -> Scores:
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        source, mask, value = node.args
        where = True
    else:
        mask, source, value = node.args
        where = node.target == aten.where.self and _number(source) is not None
        if where:
            source, value = value, source
    number = _number(value)
    if number is None or number > HIDDEN:
        raise Unlike(f"{node.name} fills with {value}; expected a number that hides, at most {HIDDEN}")
    # masked_fill(scores, hidden, min) and where(hidden, min, scores) against where(shown, scores, min)
    scores = read_scores(source)
    if scores.cap is not None and scores.cap <= 0:
        raise Unlike("the cap is negative")
    scores.steps.append(Step(mask, fill=number, where=where, flat=val(node).dim() == 3))  # type: ignore[arg-type]
    return scores


def combined(before: Node, scores: Scores, heads: int, length: Any, made: dict[Any, Node]) -> Node | None:
    """Return the mask of the operator that stands for all steps, made before `before`, or None without steps.

    Args:
        before: where new calls go.
        scores: what was read.
        heads: H.
        length: T.
        made: masks made so far, by their steps; layers that use the same ones share them.
    """
    if not scores.steps:
        return None
    flat = any(s.flat for s in scores.steps)
    key = (*scores.steps, heads, flat and str(val(scores.query).shape[0]))
    if key not in made:
        made[key] = _combine(before, scores, heads, length)
    return made[key]


def _combine(before: Node, scores: Scores, heads: int, length: Any) -> Node:
    mask: Node | None = None
    several = len(scores.steps) > 1
    for step in scores.steps:
        term = unexpanded(step.term, length)
        term = aligned(before, term, scores.query if step.flat else None, heads)
        if step.fill is not None:
            hidden = term if step.where else insert_call(before, aten.logical_not.default, term)
            if mask is None:
                mask = insert_call(before, aten.where.Scalar, hidden, step.fill, 0.0)
            else:
                mask = insert_call(before, aten.masked_fill.Scalar, mask, hidden, step.fill)
            continue
        if several and val(term).dtype == torch.float16:  # sums of smallest numbers would overflow
            term = insert_call(before, aten.to.dtype, term, torch.float32)
        if step.factor != 1:
            term = insert_call(before, aten.mul.Tensor, term, step.factor)
        mask = term if mask is None else insert_call(before, aten.add.Tensor, mask, term)
    assert mask is not None
    return mask
