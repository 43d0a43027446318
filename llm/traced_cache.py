"""What stands for a `KVCache` while a model's forward is captured: buffers are inputs of the graph, lengths are symbolic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .. import ops
from .cache import KVLayer, RowTable

_kv_append = ops.kv_append.overload

#: (key/value heads, head size, value head size, dtype, device) of a layer.
Kind = tuple[int, int, int, torch.dtype, torch.device]


class TracedRows(RowTable):
    """A row table that is an input."""

    def __init__(self, table: Tensor | None, beams: Any) -> None:
        """Keep table [B, C] and the hint `beams`."""
        self.table, self.beams = table, beams

    def read_by_llmrt(self) -> bool:
        """Return True: nothing else is captured."""
        return True


class TracedLayer(KVLayer):
    """A layer over given buffers.

    Attributes:
        kind: of the tokens that were appended; None before.
        reader: the attention module that read the layer.
    """

    def __init__(self, rows: TracedRows, length: Any, buffers: tuple[Tensor, Tensor] | None) -> None:
        """Without buffers they are made for the first tokens: to learn the kind."""
        super().__init__(rows, None)
        self.length = length
        self.kind: Kind | None = None
        self.reader: nn.Module | None = None
        self.written = False
        if buffers is not None:
            self.key_cache, self.value_cache = buffers
            self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys [B, Hk, S, D] and values [B, Hk, S, Dv]; the result only carries the layer to the attention."""
        if self.written:
            raise RuntimeError("a layer of the cache is written twice in one call")
        self.written = True
        batch, heads, tokens, dim = key_states.shape
        self.kind = heads, dim, value_states.shape[3], key_states.dtype, key_states.device
        if not self.is_initialized:
            self._allocate((batch, *self.kind), tokens)
        new = key_states.transpose(1, 2), value_states.transpose(1, 2)
        _kv_append(self.key_cache, self.value_cache, *new, self.length)
        self.length = self.length + tokens
        keys = key_states.new_empty((batch, heads, self.length, dim))
        values = value_states.new_empty((batch, heads, self.length, value_states.shape[3]))
        keys._llmrt_layer = self  # type: ignore[attr-defined]
        return keys, values

    def claim(self, module: nn.Module) -> None:
        """Note who reads the layer."""
        if self.reader is not None and self.reader is not module:
            raise RuntimeError("a layer of the cache is read by two attention modules")
        self.reader = module


class TracedCache(Cache):
    """The layers of one capture.

    Args:
        layers: how many.
        rows: shared by all.
        length: tokens before the call.
        buffers: key and value buffer per layer; None for a layer that nothing is appended to. Without the argument, every layer makes
            its own.
    """

    def __init__(
        self, layers: int, rows: TracedRows, length: Any, buffers: Sequence[tuple[Tensor, Tensor] | None] | None = None
    ) -> None:
        """Make the layers."""
        self.rows = rows
        super().__init__(
            layers=[TracedLayer(rows, length, None if buffers is None else buffers[i]) for i in range(layers)]
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to one layer."""
        return self.layers[layer_idx].update(key_states, value_states)
