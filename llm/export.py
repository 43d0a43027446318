"""A model with its key/value cache as plain tensors, for `torch.export` and AOTInductor.

transformers' cache objects do not cross the border of an exported program well: a DynamicCache comes back as new tensors, a
StaticCache has one batch size and one length for all calls. Here the buffers are inputs that are written in place, how far they
are filled follows from the shapes, and one program serves prompts, chunks of prompts and single tokens of any batch.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .. import ops
from . import attention
from .cache import KVCache, KVLayer, RowTable

_kv_append = ops.kv_append.overload


class BufferLayer(KVLayer):
    """A layer over buffers that belong to the caller: written in place, never grown.

    Args:
        rows: without a table.
        key_cache: [R, Hk, C, D].
        value_cache: [R, Hk, C, Dv].
        length: tokens stored.
    """

    def __init__(self, rows: RowTable, key_cache: Tensor, value_cache: Tensor, length: int) -> None:
        """Take the buffers over."""
        super().__init__(rows, None)
        self.key_cache, self.value_cache, self.length = key_cache, value_cache, length
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys [B, Hk, S, D] and values [B, Hk, S, Dv]; return the whole buffers for llmrt's attention."""
        keys, values = self.key_cache, self.value_cache
        _kv_append(keys, values, key_states.transpose(1, 2), value_states.transpose(1, 2), self.length)
        self.length += key_states.shape[2]
        keys = keys.view_as(keys)
        keys._llmrt_layer = self  # type: ignore[attr-defined]
        return keys, values

    def claim(self, module: nn.Module) -> None:
        """Do nothing: the layer lives for one call."""


class CachedModel(nn.Module):
    """A language model as a function of tensors: token ids, padding mask and cache buffers in, the next token's logits out.

    Args:
        model: an optimized model that runs llmrt's attention.

    Raises:
        ValueError: the model's attention is another one, or one of its layers keeps no tokens of its own.
    """

    def __init__(self, model: Any) -> None:
        """Run one token to see what the cache holds."""
        super().__init__()
        used = model.config._attn_implementation
        if used != attention.NAME:
            raise ValueError(f"the model's attention is {used!r}; export needs an optimized model that runs llmrt's")
        self.model = model
        self.rows = RowTable(1, model.config)
        cache = KVCache(model.config, max_length=1)
        with torch.no_grad():
            model(
                input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device),
                past_key_values=cache,
                use_cache=True,
            )
        if not all(layer.is_initialized for layer in cache.layers):
            raise ValueError(
                f"{type(model).__name__} has layers without a cache of their own; export cannot give them buffers"
            )
        self.like = [(layer.key_cache, layer.value_cache) for layer in cache.layers]
        self.last_only = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Append S tokens to the caches and return the logits that follow the last one.

        Args:
            input_ids: int64 [B, S], any S from 1 on.
            attention_mask: int64 or bool [B, T], 0 where a token is padding; T - S tokens are in the caches already.
            keys: per layer [R, Hk, C, D] with R at least B and C at least T, see `caches`. Tokens T - S .. T - 1 are written.
            values: per layer [R, Hk, C, Dv], likewise.

        Returns:
            [B, 1, vocabulary].
        """
        tokens, length, device = input_ids.shape[1], attention_mask.shape[1], attention_mask.device
        past = length - tokens
        # index_select, as a slice of all tokens would be another kind of tensor (contiguous) for a prompt than for a token
        positions = (
            (attention_mask.long().cumsum(-1) - 1)
            .clamp(min=0)
            .index_select(1, torch.arange(past, length, device=device))
        )
        last = torch.arange(tokens - 1, tokens, device=device)
        layers = [BufferLayer(self.rows, k, v, past) for k, v in zip(keys, values, strict=True)]
        logits: Tensor = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=Cache(layers=layers),
            use_cache=True,
            **({"logits_to_keep": last} if self.last_only else {}),
        ).logits
        return logits if self.last_only else logits.index_select(1, last)

    def caches(self, batch: int, capacity: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return empty key and value buffers of every layer for `batch` rows of at most `capacity` tokens."""
        keys, values = zip(*self.like, strict=True)

        def empty(like: Tensor) -> Tensor:
            return like.new_empty((batch, like.shape[1], capacity, like.shape[3]))

        return [empty(k) for k in keys], [empty(v) for v in values]


def export(model: Any, strict: bool = False) -> torch.export.ExportedProgram:
    """Return an optimized model as an exported program with the signature of `CachedModel.forward`.

    Batch, tokens and capacity are dynamic. ``torch.export.save`` and AOTInductor take the program; a process that loads it needs
    ``import llmrt``, which registers the operators, and no transformers.

    Args:
        model: of `optimize` with deployment_mode=False.
        strict: trace with Dynamo instead of running the Python code on fake tensors.

    Raises:
        ValueError: see `CachedModel`.
    """
    cached = CachedModel(model)
    keys, values = cached.caches(3, 16)
    ids, mask = keys[0].new_zeros((3, 5), dtype=torch.int64), keys[0].new_ones((3, 9), dtype=torch.int64)
    dim = torch.export.Dim.DYNAMIC
    buffers = [{0: dim, 2: dim} for _ in keys]
    with torch.no_grad():
        return torch.export.export(
            cached,
            (ids, mask, keys, values),
            dynamic_shapes=({0: dim, 1: dim}, {0: dim, 1: dim}, buffers, buffers),
            strict=strict,
        )
