"""Finding a pattern in a graph.

A pattern is a torch function traced over example inputs into the same canonical form as the graph. Its tensor inputs match any
value of the right dtype and rank. Sizes of the examples that have a name (``dims``) are variables: the first size that meets one
binds it and every later one must be equal, as must integers in arguments; sizes and integers without a name must be equal as they
stand. Numbers of the examples that have a name (``numbers``) match any number and are handed to the replacement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from .canonical import SHARED, canonicalize
from .nodes import VIEWS, arguments, aten, known_equal, val
from .retrace import trace

COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor, aten.maximum.default}
#: The shape arguments of these follow from the result's shape, which is compared.
SHAPED = {aten.reshape.default, aten.expand.default}


@dataclass
class State:
    """What is bound so far; copied before every choice."""

    nodes: dict[Node, Any] = field(default_factory=dict)  # pattern node -> argument of the graph
    dims: dict[str, Any] = field(default_factory=dict)  # name -> size
    numbers: dict[str, Any] = field(default_factory=dict)  # name -> number
    dtype: torch.dtype | None = None  # what the pattern's activation dtype stands for

    def copy(self) -> State:
        """Return an independent copy."""
        return State(dict(self.nodes), dict(self.dims), dict(self.numbers), self.dtype)


@dataclass
class Match:
    """A place where a pattern fits.

    Attributes:
        inputs: name of the pattern's argument -> node or number of the graph.
        outputs: nodes of the graph, in the order of the pattern's results.
        inner: the other nodes that the pattern covers.
        dims: name -> size, a number or a symbolic one.
    """

    inputs: dict[str, Any]
    outputs: list[Node]
    inner: list[Node]
    dims: dict[str, Any]


@dataclass
class Miss:
    """The place where a pattern fitted longest, and what differed then."""

    depth: int
    reason: str


class Pattern:
    """A traced pattern for one dtype of activations.

    Args:
        function: torch function; returns a tensor or a tuple, the first being what is searched for.
        inputs: name -> fake tensor or number, as the function's arguments.
        dims: size or integer among the examples -> name. Sizes must be distinct.
        loose: names of dims that may also be 1 where the example has more (broadcasting).
        any_dtype: names of inputs whose dtype does not matter.
        dtype: of the activations; float32, or bfloat16, which then stands for every 16-bit float.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Mapping[str, Any],
        dims: Mapping[int, str],
        loose: tuple[str, ...],
        any_dtype: tuple[str, ...],
        dtype: torch.dtype,
    ) -> None:
        """Trace the function."""
        self.dims, self.loose, self.dtype = dims, loose, dtype
        self.numbers = {v: n for n, v in inputs.items() if isinstance(v, float)}
        tensors = {n: v for n, v in inputs.items() if isinstance(v, torch.Tensor)}
        others = {n: v for n, v in inputs.items() if not isinstance(v, torch.Tensor)}
        mode = next((v.fake_mode for v in tensors.values()), None)  # type: ignore[attr-defined]

        def flat(*args: Any) -> Any:
            return function(**dict(zip(tensors, args, strict=True)), **others)

        traced = trace(flat, list(tensors.values()), mode)
        canonicalize(traced)
        self.graph: Graph = traced.graph
        placeholders = list(self.graph.find_nodes(op="placeholder"))
        self.placeholders = dict(zip(placeholders, tensors, strict=True))
        self.free = {p for p, name in self.placeholders.items() if name in any_dtype}
        results = self.graph.output_node().args[0]
        self.outputs: list[Node] = list(results) if isinstance(results, (tuple, list)) else [results]  # type: ignore[list-item,arg-type]
        self.calls = [n for n in self.graph.nodes if n.op == "call_function"]

    def find(self, anchor: Node) -> Match | Miss:
        """Try to fit the pattern so that its first output is `anchor`."""
        self.miss = Miss(0, "")
        state = self._node(self.outputs[0], anchor, State())
        if state is not None:
            state = self._others(state, anchor)
        if state is None:
            return self.miss
        return self._result(state)

    def _fail(self, state: State, reason: str) -> None:
        depth = sum(1 for n in state.nodes if n.op == "call_function")
        if depth >= self.miss.depth:
            self.miss = Miss(depth, reason)

    def _others(self, state: State, anchor: Node) -> State | None:
        """Find the outputs that are not above the first one: the nearest call that fits."""
        for output in self.outputs[1:]:
            if output in state.nodes:
                continue
            for candidate in self._candidates(output, state, anchor):
                extended = self._node(output, candidate, state.copy())
                if extended is not None:
                    state = extended
                    break
            else:
                self._fail(state, f"no {output.target} that completes it")
                return None
        return state

    def _candidates(self, output: Node, state: State, anchor: Node) -> Iterator[Node]:
        used = {id(v) for v in state.nodes.values()}
        order = {n: i for i, n in enumerate(anchor.graph.nodes)}
        calls = anchor.graph.find_nodes(op="call_function", target=output.target)
        near = sorted(calls, key=lambda n: (abs(order[n] - order[anchor]), order[n]))
        return (n for n in near if id(n) not in used)

    def _node(self, pattern: Node, node: Any, state: State) -> State | None:
        if pattern in state.nodes:
            if state.nodes[pattern] is node:
                return state
            self._fail(state, f"{node} stands where {state.nodes[pattern]} is expected")
            return None
        if not isinstance(node, Node):
            self._fail(state, f"{node!r} stands where a tensor is expected")
            return None
        if pattern.op != "placeholder" and (node.op != "call_function" or node.target != pattern.target):
            found = node.target if node.op == "call_function" else node.op
            self._fail(state, f"{node.name} is {found}; expected {pattern.target}")
            return None
        state = state.copy()
        if not self._value(pattern, node, state):
            return None
        state.nodes[pattern] = node
        if pattern.op == "placeholder":
            return state
        return self._arguments(pattern, node, state)

    def _value(self, pattern: Node, node: Node, state: State) -> bool:
        """Compare dtype and shape of the results."""
        expected, found = val(pattern), val(node)
        if not isinstance(expected, torch.Tensor) or not isinstance(found, torch.Tensor):
            return isinstance(found, torch.Tensor) == isinstance(expected, torch.Tensor)
        if pattern not in self.free and not self._dtype(expected.dtype, found.dtype, state):
            self._fail(state, f"{node.name} has dtype {found.dtype}; expected {state.dtype or expected.dtype}")
            return False
        if expected.dim() != found.dim():
            self._fail(state, f"{node.name} has {found.dim()} dimensions; expected {expected.dim()}")
            return False
        for a, b in zip(expected.shape, found.shape, strict=True):
            if not self._size(int(a), b, state):
                self._fail(state, f"{node.name} has shape {list(found.shape)}; expected {self._named(expected.shape)}")
                return False
        return True

    def _named(self, shape: Any) -> list[Any]:
        return [self.dims.get(int(s), int(s)) for s in shape]

    def _dtype(self, expected: torch.dtype, found: torch.dtype, state: State) -> bool:
        if expected != self.dtype:
            return expected == found
        if state.dtype is None:
            halves = (torch.bfloat16, torch.float16)
            if found != expected and not (expected in halves and found in halves):
                return False
            state.dtype = found
        return found == state.dtype

    def _size(self, expected: int, found: Any, state: State) -> bool:
        name = self.dims.get(expected)
        if isinstance(found, Node):
            found = val(found)
        if name is None:
            return known_equal(found, expected)
        if name in self.loose and known_equal(found, 1):
            return True
        if name not in state.dims:
            state.dims[name] = found
            return True
        return known_equal(state.dims[name], found)

    def _arguments(self, pattern: Node, node: Node, state: State) -> State | None:
        expected, found = arguments(pattern), arguments(node)
        if pattern.target in SHAPED:
            expected, found = expected[:1], found[:1]
        orders = [found]
        if pattern.target in COMMUTATIVE and isinstance(found[1], Node):
            orders.append([found[1], found[0], *found[2:]])
        for order in orders:
            extended = self._list(expected, order, state, node)
            if extended is not None:
                return extended
        return None

    def _list(self, expected: Any, found: Any, state: State | None, node: Node) -> State | None:
        if len(expected) != len(found):
            self._fail(state or State(), f"{node.name} has {len(found)} operands; expected {len(expected)}")
            return None
        for a, b in zip(expected, found, strict=True):
            if state is None:
                return None
            state = self._argument(a, b, state, node)
        return state

    def _argument(self, expected: Any, found: Any, state: State, node: Node) -> State | None:
        if isinstance(expected, Node):
            return self._node(expected, found, state)
        if isinstance(expected, (list, tuple)):
            return self._list(expected, found, state, node) if isinstance(found, (list, tuple)) else None
        if isinstance(expected, float) and expected in self.numbers:
            name = self.numbers[expected]
            if isinstance(found, (int, float)) and state.numbers.get(name, found) == found:
                state = state.copy()
                state.numbers[name] = found
                return state
        elif isinstance(expected, torch.dtype) and isinstance(found, torch.dtype):
            if self._dtype(expected, found, state):
                return state
        elif isinstance(expected, int) and not isinstance(expected, bool) and not isinstance(found, (bool, type(None))):
            state = state.copy()
            if self._size(expected, found, state):
                return state
        elif (
            isinstance(found, Node) == isinstance(expected, Node)
            and type(expected) is type(found)
            and expected == found
        ):
            return state
        named = self.dims.get(expected, expected) if isinstance(expected, int) else expected
        self._fail(state, f"{node.name} has the argument {found}; expected {named}")
        return None

    def _result(self, state: State) -> Match | Miss:
        outputs = [state.nodes[o] for o in self.outputs]
        covered = {state.nodes[n] for n in self.calls if n in state.nodes}
        inner = [n for n in covered if n not in outputs]
        for node in inner:
            if node.target in VIEWS or node.target in SHARED:
                continue  # layers have those in common; what is left of them costs little
            if outside := [user for user in node.users if user not in covered]:
                return Miss(len(covered), f"{node.name} ({node.target}) is used by {outside[0].name} too")
        inputs = {name: state.nodes[p] for p, name in self.placeholders.items() if p in state.nodes}
        inputs.update(state.numbers)
        return Match(inputs, outputs, inner, state.dims)


def example(mode: FakeTensorMode, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a fake tensor for a pattern's inputs."""
    with mode:
        return torch.empty(shape, dtype=dtype)
