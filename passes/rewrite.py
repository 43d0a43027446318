"""Rewrites as data, their application to a graph, and the report of what happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from .matching import Match, Miss, Pattern
from .nodes import fake_mode_of, infer, is_written_between, same_shape, val

#: dtypes that every pattern is traced with; bfloat16 stands for float16 too. It comes first: its casts make it the larger
#: pattern, and the inner part of a 16-bit norm is a float32 norm.
DTYPES = (torch.bfloat16, torch.float32)


class Examples:
    """Makes a pattern's example inputs: ``like("B", "S", "K")`` is a fake tensor with these named sizes.

    Args:
        sizes: name -> size, distinct numbers.
        dtype: of the activations.
    """

    def __init__(self, sizes: Mapping[str, int], dtype: torch.dtype) -> None:
        """Make a fake mode of its own."""
        self.sizes, self.dtype = sizes, dtype
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def like(self, *shape: str | int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a fake tensor of the shape, whose sizes are names or numbers, by default in the activations' dtype."""
        sizes = [self.sizes[s] if isinstance(s, str) else s for s in shape]
        with self.mode:
            return torch.empty(sizes, dtype=dtype or self.dtype)


def no_check(match: Match) -> str | None:
    """Accept every match."""
    return None


@dataclass(frozen=True)
class Rewrite:
    """One fusion: where `pattern` fits and `check` agrees, `replacement` takes its place.

    Args:
        name: shown in reports and accepted by the backend's option "passes".
        pattern: torch function of named inputs; returns a tensor or a tuple. Inner values that later calls use must be returned.
        replacement: function of the same names that calls operators; returns as many results. It sees graph values and numbers;
            a parameter called ``dims`` gets the sizes that the pattern bound.
        inputs: makes the pattern's inputs from `Examples`; floats among them are numbers that match any number. Several
            functions are variants (with and without a bias).
        sizes: name -> example size, distinct and above 16, unlike every fixed integer of the pattern (dimensions, powers).
        loose: names of sizes that may be 1 instead.
        any_dtype: names of inputs whose dtype does not matter.
        check: returns why a match must not be replaced, or None.
        dtypes: of activations for which the pattern is traced.
        needs: calls that every match contains; without them in the graph the pattern is not even traced.
    """

    name: str
    pattern: Callable[..., Any]
    replacement: Callable[..., Any]
    inputs: Callable[[Examples], Mapping[str, Any]] | Sequence[Callable[[Examples], Mapping[str, Any]]]
    sizes: Mapping[str, int]
    loose: tuple[str, ...] = ()
    any_dtype: tuple[str, ...] = ()
    check: Callable[[Match], str | None] = no_check
    dtypes: tuple[torch.dtype, ...] = DTYPES
    needs: tuple[Any, ...] = ()

    def __hash__(self) -> int:
        """Hash by identity: patterns are cached per rewrite."""
        return id(self)

    @property
    def variants(self) -> Sequence[Callable[[Examples], Mapping[str, Any]]]:
        """Return the functions that make example inputs."""
        return self.inputs if isinstance(self.inputs, Sequence) else [self.inputs]

    def apply(self, gm: GraphModule, report: RewriteReport) -> None:
        """Replace every match, first to last."""
        for pattern in self._patterns(gm):
            for anchor in gm.graph.find_nodes(op="call_function", target=pattern.outputs[0].target):
                if anchor._erased:
                    continue
                found = pattern.find(anchor)
                if isinstance(found, Match):
                    reason = self.check(found) or substitute(found, self.replacement)
                    if reason is None:
                        report.fired[self.name] += 1
                        continue
                    found = Miss(len(pattern.calls), reason)
                report.near(self.name, anchor, found, len(pattern.calls) // len(pattern.outputs))

    def _patterns(self, gm: GraphModule) -> Iterator[Pattern]:
        """Yield the patterns, variants of one dtype after the other, that the graph may contain."""
        nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
        values = (node.meta.get("val") for node in nodes)
        dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)}
        dtypes |= {torch.bfloat16} if torch.float16 in dtypes else set()
        if {node.target for node in nodes}.issuperset(self.needs):
            for dtype in self.dtypes:
                if dtype in dtypes:
                    yield from (pattern_of(self, dtype, index) for index in range(len(self.variants)))


@dataclass(frozen=True)
class GraphRewrite:
    """A fusion that no pattern can say, since its size varies: a function that changes the graph and returns how often."""

    name: str
    function: Callable[[GraphModule, RewriteReport], int]

    def apply(self, gm: GraphModule, report: RewriteReport) -> None:
        """Run the function and note how often it fired."""
        report.fired[self.name] += self.function(gm, report)


@cache
def pattern_of(rewrite: Rewrite, dtype: torch.dtype, index: int) -> Pattern:
    """Return a rewrite's traced pattern for a dtype of activations and one of its variants."""
    dims = {size: name for name, size in rewrite.sizes.items()}
    if len(dims) < len(rewrite.sizes) or min(dims, default=17) <= 16:
        raise ValueError(f"rewrite {rewrite.name}: sizes {dict(rewrite.sizes)} are not distinct and above 16")
    inputs = rewrite.variants[index](Examples(rewrite.sizes, dtype))
    return Pattern(rewrite.pattern, inputs, dims, rewrite.loose, rewrite.any_dtype, dtype)


@dataclass
class NearMiss:
    """A place where a rewrite almost fitted."""

    rewrite: str
    node: Node
    reason: str
    depth: int


@dataclass
class RewriteReport:
    """What the passes did to a graph; printable.

    Attributes:
        fired: rewrite -> how often.
        near_misses: places where at least half of a pattern fitted and no other rewrite took over.
        skipped: rewrite -> the error that it failed with.
        before: calls in the canonical graph; after: in the rewritten one.
    """

    fired: Counter[str] = field(default_factory=Counter)
    near_misses: list[NearMiss] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    before: int = 0
    after: int = 0

    def near(self, name: str, node: Node, miss: Miss, size: int) -> None:
        """Note a miss, if at least half of the pattern and three calls fitted."""
        if miss.depth >= max(3, size / 2):
            self.near_misses.append(NearMiss(name, node, miss.reason, miss.depth))

    def settle(self) -> None:
        """Drop misses whose place another rewrite took, and all but the longest at one place."""
        best: dict[tuple[str, Node], NearMiss] = {}
        for miss in self.near_misses:
            if miss.node._erased:
                continue
            key = (miss.rewrite, miss.node)
            if key not in best or miss.depth > best[key].depth:
                best[key] = miss
        self.near_misses = list(best.values())

    def __str__(self) -> str:
        """Return a table of what fired, what nearly did and what failed."""
        lines = [f"{self.before} calls before, {self.after} after"]
        lines += [f"  {name}: {count}" for name, count in self.fired.items() if count]
        reasons = Counter((m.rewrite, m.reason) for m in self.near_misses)
        lines += [f"  {name} did not fire ({n} times): {reason}" for (name, reason), n in reasons.items()]
        lines += [f"  {name} was skipped: {error}" for name, error in self.skipped.items()]
        return "\n".join(lines)


def insertion_point(match: Match) -> Node | None:
    """Return the node before which the replacement can stand: after all inputs, before all users of its results."""
    inside = {*match.outputs, *match.inner}
    users = [user for output in match.outputs for user in output.users if user not in inside]
    point = min(match.outputs)
    latest = max((x for x in match.inputs.values() if isinstance(x, Node)), default=None)
    if latest is not None and not latest < point:
        point = latest.next
    if len(match.outputs) == 1:
        return match.outputs[0]
    return None if any(user < point for user in users) else point


def substitute(match: Match, replacement: Callable[..., Any]) -> str | None:
    """Put the replacement's calls into the graph; return why that is impossible, with the graph as it was, or None."""
    point = insertion_point(match)
    if point is None:
        return "a result is used before all inputs are there"
    nodes = [x for x in match.inputs.values() if isinstance(x, Node)]
    first = min([*match.outputs, *match.inner])
    if is_written_between(first, max([*match.outputs, point]), nodes):
        return "an input is written to in between"
    graph = point.graph
    tracer = GraphAppendingTracer(graph)
    before = point.prev
    with graph.inserting_before(point):
        bound = {k: Proxy(v, tracer) if isinstance(v, Node) else v for k, v in match.inputs.items()}
        if "dims" in replacement.__code__.co_varnames[: replacement.__code__.co_argcount]:
            bound["dims"] = match.dims
        results = replacement(**bound)
        if isinstance(results, Proxy):
            several = len(match.outputs) > 1
            results = tuple(results[i] for i in range(len(match.outputs))) if several else (results,)  # type: ignore[index]
    made = []
    node = before.next
    while node is not point:
        made.append(node)
        node = node.next
    mode = fake_mode_of(graph)
    for node in made:
        infer(node, mode)
    new = [r.node for r in results]
    reason = _unlike(match.outputs, new)
    if reason is not None:
        for node in reversed(made):
            graph.erase_node(node)
        return reason
    for old, result in zip(match.outputs, new, strict=True):
        old.replace_all_uses_with(result)
    _erase({*match.outputs, *match.inner})
    return None


def _erase(covered: Iterable[Node]) -> None:
    """Erase the nodes that nobody uses any more, users first."""
    for node in sorted(covered, reverse=True):
        if not node.users:
            node.graph.erase_node(node)


def _unlike(old: list[Node], new: list[Node]) -> str | None:
    for a, b in zip(old, new, strict=True):
        x, y = val(a), val(b)
        if x.dtype != y.dtype:
            return f"the result would be {y.dtype} instead of {x.dtype}"
        if not same_shape(x, y):
            return f"the result would have shape {list(y.shape)} instead of {list(x.shape)}"
    return None
