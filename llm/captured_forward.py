"""One captured forward of a model over a `KVCache`: which calls it fits, how it is captured and how it is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .. import ops
from ..passes.capture import Capture, Captured, quiet_modes
from ..passes.executor import compile_graph
from ..passes.order import rewrite
from .attention import padding_is_known
from .cache import KVCache
from .traced_cache import Kind, TracedCache, TracedRows

#: Names of all sizes that a graph may depend on: rows and tokens of the call, tokens before it, rows and capacity of the buffers,
#: columns of the row table, beams.
SIZES = ("batch", "tokens", "length", "rows", "capacity", "columns", "beams")


class CaptureError(RuntimeError):
    """A forward cannot be a graph; the message says why."""


class Kinds(NamedTuple):
    """What the layers of the cache hold and who reads them.

    Args:
        kinds: per layer; None for layers that nothing is appended to.
        readers: the attention module per layer.
    """

    kinds: tuple[Kind | None, ...]
    readers: tuple[nn.Module | None, ...]

    @property
    def device(self) -> torch.device:
        """Of the keys and values, which is where the model runs."""
        assert self.kinds[0] is not None
        return self.kinds[0][4]


class Key(NamedTuple):
    """What makes another graph whatever the sizes are."""

    one_row: bool
    one_token: bool
    one_cache_row: bool
    mask: bool
    positions: int  # 0: not given, 1: one row for all, 2: one row each
    table: bool
    beams: bool
    last: bool  # only the last logits
    kv_dtype: torch.dtype | None  # of the buffers; None: that of the tokens

    def describe(self) -> str:
        """Return a few words for the report."""
        parts = ["one token" if self.one_token else "several tokens", "one row" if self.one_row else "several rows"]
        parts += [] if self.kv_dtype is None else [f"{str(self.kv_dtype)[6:]} cache"]
        parts += ["padding"] * self.mask + ["beams"] * self.table
        parts += ["last logits" if self.last else "all logits"] * (not self.one_token)
        return ", ".join(parts)


@dataclass
class Call:
    """A forward that a graph can run, with the cache ready for its tokens.

    Args:
        ids, mask, positions: as the model takes them; of a shared prompt, one row for all of its beams.
        cache: with room for the tokens.
        share: rows of the caller that each row stands for: the beams of a prompt, which are still the same.
        last: whether only the last logits are wanted.
    """

    ids: Tensor
    mask: Tensor | None
    positions: Tensor | None
    cache: KVCache
    share: int
    last: bool

    def __post_init__(self) -> None:
        """Read the sizes."""
        rows, first = self.cache.rows, self.cache.layers[0]
        self.stored = [layer for layer in self.cache.layers if layer.is_initialized]
        batch, tokens = self.ids.shape
        buffer = first.key_cache[:: self.share]
        table, beams = (None, 1) if self.share > 1 else (rows.table, rows.beams)
        columns = 0 if table is None else table.shape[1]
        self.sizes = batch, tokens, first.length, buffer.shape[0], buffer.shape[2], columns, beams
        self.key = Key(
            batch == 1,
            tokens == 1,
            buffer.shape[0] == 1,
            self.mask is not None,
            0 if self.positions is None else 1 if self.positions.shape[0] == 1 else 2,
            table is not None,
            beams > 1,
            self.last,
            self.cache.kv_dtype,
        )

    def inputs(self) -> list[Any]:
        """Return the graph's inputs."""
        key, rows = self.key, self.cache.rows
        inputs: list[Any] = [self.ids, self.cache.layers[0].length]
        if key.mask:
            inputs.append(self.mask)
        if key.positions:
            inputs.append(self.positions)
        if key.table:
            inputs.append(rows.table)
        if key.beams:
            inputs.append(rows.beams)
        for layer in self.stored:
            inputs += (layer.key_cache[:: self.share], layer.value_cache[:: self.share])
        return inputs


def learn_kinds(model: Any) -> Kinds:
    """Return what a model appends to each layer of a cache, found out over fake tensors."""
    capture = Capture()
    cache = TracedCache(model.config.get_text_config(decoder=True).num_hidden_layers, TracedRows(None, 1), 0)
    ids = capture.tensor((1, 2), torch.int64, model.get_input_embeddings().weight.device)
    token = padding_is_known.set(False)
    try:
        with quiet_modes(), capture.mode:
            type(model).forward(model, input_ids=ids, past_key_values=cache, use_cache=True)
    finally:
        padding_is_known.reset(token)
    kinds = tuple(layer.kind for layer in cache.layers)
    if kinds[0] is None or any(layer.kind is not None and layer.reader is None for layer in cache.layers):
        raise CaptureError("not all of its layers use the attention interface with the cache")
    return Kinds(kinds, tuple(layer.reader for layer in cache.layers))


class CapturedForward:
    """The graph of one `Key`.

    Attributes:
        captured: the graph as it is run.
        rewritten: what the passes did to it.
        nodes: calls in it.
        quantized: whether linears round their inputs, which makes small differences larger.
    """

    def __init__(self, model: Any, kinds: Kinds, call: Call) -> None:
        """Capture.

        Raises:
            CaptureError: the forward does what no graph can hold.
            Exception: what the forward raises when it looks at the values of a tensor.
        """
        self._fields: list[tuple[str, int]] = []
        self.captured = self._capture(model, kinds, call)
        with quiet_modes():
            self.rewritten = rewrite(self.captured.module)
        graph = self.captured.module.graph
        if any(node.target is torch.ops.aten.new_empty.default for node in graph.nodes):
            raise CaptureError("the model reads cached keys or values outside of the attention interface")
        self.nodes = sum(node.op == "call_function" for node in graph.nodes)
        products = ops.quant_linear.overload, ops.quant_experts.overload
        self.quantized = any(graph.find_nodes(op="call_function", target=target) for target in products)
        self.fits: Callable[..., bool] = self.captured.condition(SIZES)
        self.run = compile_graph(self.captured.module)

    def _capture(self, model: Any, kinds: Kinds, call: Call) -> Captured:
        capture, key = Capture(), call.key
        sizes = dict(zip(SIZES, call.sizes, strict=True))

        def size(name: str, fixed: int | None = None, least: int = 0) -> Any:
            return fixed if fixed is not None else capture.size(name, sizes[name], least)

        batch, tokens = size("batch", 1 if key.one_row else None, 2), size("tokens", 1 if key.one_token else None, 2)
        length = size("length")
        rows, capacity = size("rows", 1 if key.one_cache_row else None, 2), size("capacity")
        ids = capture.tensor((batch, tokens), call.ids.dtype, kinds.device)
        given: dict[str, Any] = {"input_ids": ids, "length": length}
        if key.mask:
            given["attention_mask"] = capture.tensor((batch, length + tokens), torch.bool, kinds.device)
        if key.positions:
            shape = (1 if key.positions == 1 else batch, tokens)
            given["position_ids"] = capture.tensor(shape, torch.int64, kinds.device)
        if key.table:
            given["table"] = capture.tensor((batch, size("columns")), torch.int32, kinds.device)
        if key.beams:
            given["beams"] = size("beams", least=2)
        buffers: list[Any] = []
        for kind in kinds.kinds:
            if kind is not None:
                heads, dim, value_dim, dtype, device = kind
                stored = key.kv_dtype or dtype
                widths = (ops.stored_width(d, stored) for d in (dim, value_dim))
                buffers += [capture.tensor((rows, heads, capacity, width), stored, device) for width in widths]
        names = tuple(given)

        def forward(*inputs: Any) -> Any:
            values = dict(zip(names, inputs, strict=False))
            flat = iter(inputs[len(names) :])
            pairs = [None if kind is None else (next(flat), next(flat)) for kind in kinds.kinds]
            shared = TracedRows(values.pop("table", None), values.pop("beams", 1))
            cache = TracedCache(len(pairs), shared, values.pop("length"), pairs)
            if key.last:
                values["logits_to_keep"] = 1
            out = type(model).forward(model, **values, past_key_values=cache, use_cache=True)
            return self._results(out, cache)

        token = padding_is_known.set(key.mask)
        try:
            return capture.trace(forward, [*given.values(), *buffers])
        finally:
            padding_is_known.reset(token)

    def _results(self, out: Any, cache: TracedCache) -> list[Tensor]:
        """Return the tensors of the output; note where they belong."""
        if not isinstance(out, ModelOutput):
            raise CaptureError(f"forward returns a {type(out).__name__}, not transformers' ModelOutput")
        tensors: list[Tensor] = []
        self._class, self._fields = type(out), []
        for name, value in out.items():
            if isinstance(value, Tensor):
                self._fields.append((name, len(tensors)))
                tensors.append(value)
            elif value is cache:
                self._fields.append((name, -1))
            else:
                raise CaptureError(f"the output's {name} is a {type(value).__name__}")
        return tensors

    def place(self, name: str) -> int:
        """Return where among the graph's outputs a field of the output object stands."""
        return dict(self._fields)[name]

    def output(self, tensors: list[Tensor], cache: KVCache) -> Any:
        """Return the output object."""
        return self._class(**{name: cache if i < 0 else tensors[i] for name, i in self._fields})
