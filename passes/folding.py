"""Values that follow from parameters and buffers alone: found, computed once, and computed again when a parameter changes.

What is static: tensors that the graph holds, and inputs that Dynamo read from a module (`retrace` notes them in
``meta["static"]``). A rewrite puts what it makes of them into the graph as a constant and says how (`Fold`). For a compiled graph the
constants become inputs (`lift_folds`), and `FoldedGraph` hands them over at every call: made for the very tensors that came in, and
made anew when one of them was written to or replaced. Changes that torch does not count are not seen: writes through ``.data``.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from .capture import quiet_modes
from .nodes import VIEWS, fake_mode_of, is_call, may_share_memory, mutated_roots, storage_root, val
from .rewrite import GraphRewrite, RewriteReport

#: Bytes up to which a constant may be larger than what it is made from.
SMALL = 1 << 16


class Unfoldable(Exception):
    """A value cannot be made into what a rewrite wants; the message is the reason."""


def is_pure(node: Node) -> bool:
    """Return whether a call gives the same for the same arguments and changes nothing."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", "") == "getitem"
    return not (
        target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags or "empty" in target._opname
    )


class Static:
    """The values of a graph that follow from its parameters and buffers alone; ``node in static`` asks.

    Args:
        gm: graph in which every node has ``meta["val"]``.
    """

    def __init__(self, gm: GraphModule) -> None:
        """Classify every node."""
        self.gm = gm
        self._tensors: dict[Node, Tensor] = {}
        self._values: set[Node] = set()
        written = mutated_roots(gm.graph)
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                tensor = self._real(node)
                if tensor is not None and node not in written:
                    self._tensors[node] = tensor
                    self._values.add(node)
            elif node.op == "call_function" and self._follows(node) and storage_root(node) not in written:
                self._values.add(node)

    def _follows(self, node: Node) -> bool:
        known = all(x in self._values for x in node.all_input_nodes)
        return known and is_pure(node) and _has_fixed_shape(node)

    def _real(self, node: Node) -> Tensor | None:
        value = node.meta.get("static")
        if node.op == "get_attr":
            value = self.gm
            for part in str(node.target).split("."):
                value = getattr(value, part)
        usable = isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_inference()
        return value if usable else None

    def __contains__(self, node: Any) -> bool:
        """Return whether the argument is such a value."""
        return node in self._values

    def is_source(self, node: Node) -> bool:
        """Return whether the node is a parameter, buffer or constant itself."""
        return node in self._tensors

    def tensor(self, source: Node) -> Tensor:
        """Return the tensor that a source stands for now."""
        return self._tensors[source]


def _has_fixed_shape(node: Node) -> bool:
    value = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else [value]
    return all(isinstance(v, Tensor) and all(isinstance(s, int) for s in v.shape) for v in parts)


class Subgraph:
    """A computation over sources of a graph, collected in order to be evaluated outside of it.

    Args:
        static: of the graph.
    """

    def __init__(self, static: Static) -> None:
        """Start empty."""
        self.static, self.graph = static, Graph()
        self.sources: list[Node] = []
        self._copies: dict[Node, Node] = {}

    def copy(self, node: Node) -> Node:
        """Return the copy of a static node; copies what it needs first."""
        if node not in self._copies:
            if self.static.is_source(node):
                self.sources.append(node)
                self._copies[node] = self.graph.placeholder(f"source_{len(self.sources)}")
            else:
                self._copies[node] = self.graph.node_copy(node, self.copy)
        return self._copies[node]

    def again(self, node: Node, first: Node) -> Node:
        """Return a further copy of a node, with another first argument."""
        args = torch.fx.node.map_arg(tuple(node.args[1:]), self.copy)
        kwargs = torch.fx.node.map_arg(node.kwargs, self.copy)
        return self.graph.call_function(node.target, (first, *args), kwargs)  # type: ignore[arg-type]

    def function(self, *outputs: Node) -> Callable[..., tuple[Tensor, ...]]:
        """Return the function of the sources' tensors that computes the outputs."""
        self.graph.output(outputs)
        return GraphModule(torch.nn.Module(), self.graph)


class Fold:
    """How constants of a graph are made from its sources.

    Args:
        static: of the graph.
        sources: nodes of the graph; tensors that it holds are bound, inputs are `sources` from then on.
        make: function of the sources' tensors; raises `Unfoldable` when the constants cannot be made any more.

    Attributes:
        values: the constants made from the sources as they are now.

    Raises:
        Unfoldable: by `make`.
    """

    def __init__(self, static: Static, sources: Sequence[Node], make: Callable[..., tuple[Tensor, ...]]) -> None:
        """Make the constants."""
        self.sources = [s for s in sources if s.op == "placeholder"]
        self._make = make
        self._held = [None if s.op == "placeholder" else static.tensor(s) for s in sources]
        self.values = self.make([static.tensor(s) for s in self.sources])

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the constants for these tensors of the inputs; they share no memory with them."""
        given = iter(tensors)
        with quiet_modes():
            made = self._make(*(next(given) if held is None else held for held in self._held))
            return tuple(v.clone() if v._is_view() else v for v in made)

    def insert(self, gm: GraphModule, before: Node) -> list[Node]:
        """Return new nodes for the constants, which the module holds from now on."""
        nodes = []
        for index, value in enumerate(self.values):
            number = 0
            while hasattr(gm, f"_folded_{number}"):
                number += 1
            gm.register_buffer(f"_folded_{number}", value, persistent=False)
            with gm.graph.inserting_before(before):
                node = gm.graph.get_attr(f"_folded_{number}")
            node.meta["val"] = fake_constant(gm, value)
            node.meta["fold"] = (self, index)
            nodes.append(node)
        return nodes


def fake_constant(gm: GraphModule, value: Tensor) -> Tensor:
    """Return what stands for a tensor of fixed shape in the graph's ``meta["val"]``."""
    mode = fake_mode_of(gm.graph)
    return value if mode is None else mode.from_tensor(value, static_shapes=True)


def fold_constants(gm: GraphModule, report: RewriteReport) -> int:
    """Compute once what follows from parameters and buffers, where that takes no more memory than they do."""
    static, count = Static(gm), 0
    for node in list(gm.graph.nodes):
        if node not in static or node.op != "call_function" or not isinstance(val(node), Tensor):
            continue
        wanted = [user for user in node.users if user not in static]
        if not wanted or _may_escape(node) or not _is_computed(node):
            continue
        part = Subgraph(static)
        function = part.function(part.copy(node))
        if _bytes(val(node)) > max(SMALL, sum(_bytes(val(s)) for s in part.sources)):
            continue
        fold = Fold(static, part.sources, function)
        if fold.values[0].stride() != val(node).stride():
            continue
        (constant,) = fold.insert(gm, node)
        node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in static)
        count += 1
    return count


FOLDING = (GraphRewrite("fold constants", fold_constants),)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _is_computed(node: Any) -> bool:
    while is_call(node, *VIEWS):
        node = node.args[0]
    return node.op == "call_function"


def _may_escape(node: Node) -> bool:
    """Return whether a caller may get the memory of a value, and write to it."""
    return any(u.op == "output" or (may_share_memory(u) and _may_escape(u)) for u in node.users)


def lift_folds(gm: GraphModule) -> list[Fold]:
    """Let the constants that depend on inputs be inputs themselves, behind the others.

    The graph then holds no tensor that came in from outside.

    Returns:
        What makes them, in the order of the new inputs.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    folds: dict[Fold, list[Node | None]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        fold, index = node.meta.get("fold", (None, 0))
        if fold is not None and fold.sources:
            folds.setdefault(fold, [None] * len(fold.values))[index] = node
    last = inputs[-1] if inputs else None
    for number, (fold, nodes) in enumerate(folds.items()):
        for index, node in enumerate(nodes):
            assert last is not None
            with gm.graph.inserting_after(last):
                last = gm.graph.placeholder(f"folded_{number}_{index}")
            last.meta["val"] = fake_constant(gm, fold.values[index])
            if node is None:  # nobody uses this one
                continue
            node.replace_all_uses_with(last)
            gm.graph.erase_node(node)
            delattr(gm, str(node.target))
    for node in inputs:
        node.meta.pop("static", None)
    gm.recompile()
    return list(folds)


class _Variant:
    """Constants made for certain tensors in certain states; None: they cannot be made."""

    def __init__(self, inputs: Sequence[tuple[int, Tensor]], constants: list[Tensor] | None) -> None:
        self.constants = constants
        self.states = [(i, weakref.ref(x), x._version, x.data_ptr()) for i, x in inputs]

    def is_of(self, args: Sequence[Any]) -> bool:
        """Return whether these are the arguments, none of them written to since."""
        for index, reference, version, pointer in self.states:
            x = reference()
            if x is None or x is not args[index] or x._version != version or x.data_ptr() != pointer:
                return False
        return True

    def is_gone(self, args: Sequence[Any]) -> bool:
        """Return whether it can never be used again, or belongs to tensors that are among the arguments but changed."""
        sources = [reference() for _, reference, _, _ in self.states]
        changed = all(source is args[state[0]] for source, state in zip(sources, self.states, strict=True))
        return changed or any(source is None for source in sources)


class FoldedGraph:
    """A compiled graph together with constants that follow from its inputs.

    Args:
        run: the graph with the constants as further inputs.
        captured: the graph without them: what runs when they cannot be made for some inputs.
        folds: as `lift_folds` returned them.
        graph: that they belong to.
        inputs: that their values were made from.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        captured: Callable[..., Any],
        folds: Sequence[Fold],
        graph: Graph,
        inputs: Sequence[Any],
    ) -> None:
        """Take over the constants."""
        self._run, self._captured, self._folds = run, captured, folds
        number = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
        self._numbers = [[number[s] for s in fold.sources] for fold in folds]
        self._sources = sorted({i for numbers in self._numbers for i in numbers})
        constants = [value for fold in folds for value in fold.values]
        for fold in folds:
            fold.values = ()
        self._variants = [_Variant([(i, inputs[i]) for i in self._sources], constants)]

    def __call__(self, *args: Any) -> Any:
        """Run the graph with the constants of these arguments."""
        for variant in self._variants:
            if variant.is_of(args):
                break
        else:
            variant = self._add(args)
        if variant.constants is None:
            return self._captured(*args)
        return self._run(*args, *variant.constants)

    def _add(self, args: Sequence[Any]) -> _Variant:
        self._variants = [v for v in self._variants if not v.is_gone(args)]
        inputs = [(i, args[i]) for i in self._sources]
        if any(x.is_inference() for _, x in inputs):
            return _Variant([], None)
        try:
            constants: list[Tensor] | None = []
            for fold, numbers in zip(self._folds, self._numbers, strict=True):
                constants += fold.make([args[i] for i in numbers])  # type: ignore[operator]
        except Unfoldable as error:
            constants = None
            warnings.warn(f"llmrt: a changed weight needs another graph ({error}); it runs as captured", stacklevel=3)
        variant = _Variant(inputs, constants)
        self._variants.append(variant)
        return variant
