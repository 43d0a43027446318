"""The key/value cache with indirect access: beam search permutes a small table of rows; keys and values never move.

Physical row r of a layer's buffers [R, Hk, C, D] holds tokens that some beam wrote. One int32 table [B, C], shared by all layers,
says for every logical row b and token t which physical row holds it. Reordering the beams reorders the table's rows; token t
of row b is always written to physical row b, so the table needs an entry of its own only for the past.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .. import ops
from . import attention, huge_pages

_kv_append = ops.kv_append.overload
#: Tokens that a layer reserves at first when it is not told how many will come; buffers double from there.
FIRST_CAPACITY = 256
#: Largest first reservation, whatever the announced length: a default max_length of 128k tokens is rarely used up.
LARGEST_FIRST_CAPACITY = 8192


#: The attribute of a decoder's configuration that says what keys and values are stored as; `save_pretrained` keeps it.
KV_DTYPE = "kv_cache_dtype"
_KV_DTYPES = ("int8", "float16", "bfloat16", "float32")


def stored_dtype(kv_dtype: Any, dtype: torch.dtype | None = None) -> torch.dtype | None:
    """Return a dtype of keys and values that is given by name or as it is; None for None.

    Raises:
        ValueError: no cache has this dtype, or none with tokens of `dtype` (where that is given).
    """
    if kv_dtype is None:
        return None
    name = str(kv_dtype).removeprefix("torch.")
    if name not in _KV_DTYPES:
        raise ValueError(f"kv_dtype is {kv_dtype!r}; valid: {', '.join(_KV_DTYPES)}, or None for the model's dtype")
    if name == "bfloat16" and dtype not in (None, torch.bfloat16):
        raise ValueError(f"kv_dtype is bfloat16 for a {str(dtype)[6:]} model; valid: {str(dtype)[6:]}, float16, int8")
    stored: torch.dtype = getattr(torch, name)
    return stored


def choose_kv_dtype(model: Any, kv_dtype: Any) -> None:
    """Let the caches of a model store keys and values as `kv_dtype`; None: leave it as it is.

    Raises:
        ValueError: see `stored_dtype`.
    """
    stored = stored_dtype(kv_dtype, model.dtype)
    if stored is not None:
        setattr(model.config.get_text_config(decoder=True), KV_DTYPE, str(stored).removeprefix("torch."))


def _no_config() -> None:
    return None


class RowTable:
    """Which physical row holds a token: the ancestor table that all layers share.

    Args:
        beams: logical rows [g * beams, (g + 1) * beams) start from one prompt, which is stored once.
        config: of the model; says whether the attention that will read the cache knows the table.
    """

    def __init__(self, beams: int, config: Any) -> None:
        """Start as the identity."""
        self.beams = beams
        self.table: Tensor | None = None  # int32 [B, C]; None: row b is in physical row b
        self._config: Callable[[], Any] = weakref.ref(config)

    def read_by_llmrt(self) -> bool:
        """Return whether the model's attention is llmrt's, which reads through the table."""
        config = self._config()
        return config is not None and config._attn_implementation == attention.NAME

    def make(self, batch: int, capacity: int, device: torch.device) -> Tensor:
        """Return the table, made or grown to [batch, at least capacity]; new entries point to the own row."""
        old = self.table
        if old is None or old.shape[1] < capacity:
            own = torch.arange(batch, dtype=torch.int32, device=device).unsqueeze(1).repeat(1, capacity)
            if old is not None:
                own[:, : old.shape[1]] = old
            self.table = own
        assert self.table is not None
        return self.table

    def own(self, start: int, end: int) -> None:
        """Let tokens start .. end - 1 point to the own row again."""
        if self.table is not None and end > start:
            batch = self.table.shape[0]
            self.table[:, start:end] = torch.arange(batch, dtype=torch.int32, device=self.table.device).unsqueeze(1)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the model: whoever reads the cache next is taken for one that knows no table."""
        return {"beams": self.beams, "table": self.table, "_config": _no_config}

    def __deepcopy__(self, memo: dict[int, Any]) -> RowTable:
        """Copy the table; the configuration stays the model's."""
        other = RowTable.__new__(RowTable)
        memo[id(self)] = other
        other.beams, other._config = self.beams, self._config
        other.table = None if self.table is None else self.table.clone()
        return other


def _shape(keys: Tensor, values: Tensor) -> tuple[Any, ...]:
    batch, heads, _, dim = keys.shape
    return batch, heads, dim, values.shape[3], keys.dtype, keys.device


class KVLayer(CacheLayerMixin):
    """One layer of a `KVCache`.

    Attributes:
        key_cache: [R, Hk, C, D] or, int8, [R, Hk, C, D + 4], see `ops.kv_append`; tokens 0 .. length - 1 are valid.
        value_cache: [R, Hk, C, Dv] or, int8, [R, Hk, C, Dv + 4].
        length: tokens stored.
        rows: the table shared by all layers.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, rows: RowTable, max_length: int | None, kv_dtype: torch.dtype | None = None) -> None:
        """Make an empty layer; buffers come with the first tokens, of kv_dtype or the tokens' dtype."""
        self.rows = rows
        self.kv_dtype = kv_dtype
        self.max_length = max_length
        self.length = 0
        self.batch = 0
        self.is_initialized = False
        self._fits: tuple[Any, ...] | None = None
        self._owner: weakref.ref[nn.Module] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve buffers for keys [B, Hk, S, D] and values [B, Hk, S, Dv]."""
        self._allocate(_shape(key_states, value_states), key_states.shape[2])

    def _allocate(self, fits: tuple[Any, ...], tokens: int) -> None:
        batch, heads, dim, value_dim, self.dtype, self.device = fits
        capacity = self.max_length if self.max_length is not None else FIRST_CAPACITY + tokens
        capacity = max(tokens, min(capacity, max(LARGEST_FIRST_CAPACITY, tokens + FIRST_CAPACITY)), 1)
        stored = self.kv_dtype or self.dtype
        self.key_cache, self.value_cache = (
            huge_pages.empty((batch, heads, capacity, ops.stored_width(width, stored)), stored, self.device)
            for width in (dim, value_dim)
        )
        self.batch = batch
        self._fits = fits
        self.is_initialized = True

    def reserve(self, fits: tuple[Any, ...], tokens: int) -> int:
        """Make room for S more tokens and bring the row table up to them.

        Args:
            fits: (batch, key/value heads, head size, value head size, dtype, device) of what will be appended.
            tokens: S.

        Returns:
            `every` of kv_append: the distance between the rows to write.

        Raises:
            ValueError: no token, or heads, sizes, dtype or batch differ from what the cache holds.
        """
        if self._fits != fits:
            self._refit(fits, tokens)
        if tokens == 0:
            raise ValueError("the input has no token; pass at least one")
        start, rows = self.length, self.rows
        end = start + tokens
        if end > self.key_cache.shape[2]:
            self._grow(end)
        if start == 0 and rows.table is not None and rows.table.shape[0] != self.batch:
            rows.table = None
        if start == 0 and rows.beams > 1 and self.batch % rows.beams == 0:
            first = torch.arange(self.batch, dtype=torch.int32, device=self.device) // rows.beams * rows.beams
            rows.make(self.batch, end, self.device)[:, :end] = first.unsqueeze(1)
            return rows.beams
        if rows.table is not None and rows.table.shape[1] < end:
            rows.make(self.batch, self.key_cache.shape[2], self.device)
        return 1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys [B, Hk, S, D] and values [B, Hk, S, Dv]; return all of them as [B, Hk, T, D] and [B, Hk, T, Dv].

        The returned keys carry this layer for llmrt's attention. If another attention will read them and beams were reordered, they
        are gathered into the logical order first; where the buffers have another dtype than the tokens, they are converted.

        Raises:
            ValueError: no token, or heads, sizes, dtype or batch differ from what the cache holds.
        """
        tokens = key_states.shape[2]
        every = self.reserve(_shape(key_states, value_states), tokens)
        start, rows = self.length, self.rows
        end = start + tokens
        _kv_append(
            self.key_cache, self.value_cache, key_states.transpose(1, 2), value_states.transpose(1, 2), start, every
        )
        self.length = end
        converted = self.kv_dtype not in (None, self.dtype)
        if (rows.table is not None or converted) and not rows.read_by_llmrt():
            return self._logical(self.key_cache), self._logical(self.value_cache)
        keys, values = self.key_cache.narrow(2, 0, end), self.value_cache.narrow(2, 0, end)
        keys._llmrt_layer = self  # type: ignore[attr-defined]
        return keys, values

    def _refit(self, given: tuple[Any, ...], tokens: int) -> None:
        if self.length == 0:
            self._allocate(given, tokens)
            return
        held = self._fits
        names = ("batch", "key/value heads", "head size", "value head size", "dtype", "device")
        wrong = [f"{n} {g}, holds {h}" for n, g, h in zip(names, given, held or (), strict=True) if g != h]
        raise ValueError(
            f"the cache does not fit: {'; '.join(wrong)}. It belongs to another model, batch or dtype; make a new one"
        )

    def _grow(self, tokens: int) -> None:
        """Make room for `tokens`, at least doubling."""
        capacity = max(tokens, 2 * self.key_cache.shape[2])
        for name in ("key_cache", "value_cache"):
            old = getattr(self, name)
            new = huge_pages.empty((*old.shape[:2], capacity, old.shape[3]), old.dtype, old.device)
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the module that reads it; a copy in memory keeps it, see `__deepcopy__`."""
        return {**self.__dict__, "_owner": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> KVLayer:
        """Copy buffers and table; the copy belongs to the same model."""
        other = KVLayer.__new__(KVLayer)
        memo[id(self)] = other
        other.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return other

    def claim(self, module: nn.Module) -> None:
        """Raise ValueError if another attention module than the first one reads this layer."""
        owner = self._owner
        if owner is not None and owner() is module:
            return
        if owner is not None and owner() is not None:
            raise ValueError(
                "the cache was filled by another model (or another layer); make a new KVCache for this one, "
                "or call reset() on it"
            )
        self._owner = weakref.ref(module)

    @property
    def claimed(self) -> bool:
        """Whether an attention module has read this layer."""
        return self._owner is not None

    def _logical(self, buffer: Tensor) -> Tensor:
        held = buffer[: self.batch, :, : self.length]
        if self.rows.table is not None:
            index = self.rows.table[: self.batch, : self.length].long()
            tokens = torch.arange(self.length, device=buffer.device)
            held = buffer[:, :, : self.length].transpose(1, 2)[index, tokens].transpose(1, 2)
        return ops.load_rows(held, self.dtype)

    @property
    def keys(self) -> Tensor | None:
        """Keys in logical order, [B, Hk, T, D]; a copy after beams were reordered. None before the first token."""
        return self._logical(self.key_cache) if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """Values in logical order, [B, Hk, T, Dv]."""
        return self._logical(self.value_cache) if self.is_initialized else None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (tokens after the next call, offset 0): nothing is dropped, windows are the attention's."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the tokens stored."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: the cache grows."""
        return -1

    def reset(self) -> None:
        """Forget all tokens; buffers stay for the next sequence if it has the same shape."""
        self.length = 0
        self._owner = None

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest `-tokens_to_remove` tokens (a negative number, as in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number of tokens to remove")
        self.length = max(0, self.length + tokens_to_remove)

    def resize(self, batch: int) -> None:
        """Make the logical batch `batch`; physical rows are added when there are fewer."""
        if not self.is_initialized:
            return
        assert self._fits is not None
        if batch > self.key_cache.shape[0]:
            for name in ("key_cache", "value_cache"):
                old = getattr(self, name)
                new = huge_pages.empty((batch, *old.shape[1:]), old.dtype, old.device)
                new[: old.shape[0], :, : self.length] = old[:, :, : self.length]
                setattr(self, name, new)
        self.batch = batch
        self._fits = (batch, *self._fits[1:])


class KVCache(Cache):
    """transformers `Cache` with indirect access; `generate` of an optimized model uses it by default.

    Beam search moves no key and no value: `reorder_cache` permutes one int32 table for all layers. Sliding-window layers keep
    everything, the window is applied by the attention.

    Args:
        config: the model's configuration (its text decoder's number of layers is read).
        max_length: tokens to reserve room for; the cache grows beyond by doubling.
        beams: rows that start from the same prompt (beams, or returned sequences of one sample): the first tokens are then stored
            once per sample.
        kv_dtype: what keys and values are stored as: "int8" (with a scale per token and head), "float16", or the model's dtype.
            None: what `optimize` was told, else the model's dtype.
    """

    def __init__(
        self,
        config: Any,
        max_length: int | None = None,
        beams: int = 1,
        kv_dtype: str | torch.dtype | None = None,
    ) -> None:
        """Make an empty cache."""
        if beams < 1:
            raise ValueError(f"beams is {beams}; valid: 1 and more")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}; valid: 1 and more, or None")
        decoder = config.get_text_config(decoder=True)
        self.rows = RowTable(beams, decoder)
        #: What keys and values are stored as; None: the tokens' dtype.
        self.kv_dtype = stored_dtype(getattr(decoder, KV_DTYPE, None) if kv_dtype is None else kv_dtype)
        layers = [KVLayer(self.rows, max_length, self.kv_dtype) for _ in range(decoder.num_hidden_layers)]
        super().__init__(layers=layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to one layer, see `KVLayer.update`."""
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"the cache has {len(self.layers)} layers, layer {layer_idx} was asked for: another model's"
            )
        return self.layers[layer_idx].update(key_states, value_states)

    def _first(self) -> KVLayer:
        return self.layers[0]

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.rows.table = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let logical row b continue row beam_idx[b] (int64 [B])."""
        first = self._first()
        if first.length == 0:
            return
        table = self.rows.make(first.batch, first.key_cache.shape[2], first.device)
        past = table[:, : first.length]
        table[:, : first.length] = past.index_select(0, beam_idx.to(table.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest `-tokens_to_remove` tokens."""
        before = self._first().length
        super().crop(tokens_to_remove)
        self.rows.own(self._first().length, before)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the past is not copied."""
        first = self._first()
        self.batch_select_indices(torch.arange(first.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (int64, or bool [B]), in that order; the past is not copied."""
        first = self._first()
        if first.length == 0:
            return
        table = self.rows.make(first.batch, first.length, first.device)[indices]
        self.rows.table = table.contiguous()
        for layer in self.layers:
            layer.resize(table.shape[0])
        self.rows.own(first.length, table.shape[1])

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, None]]:
        """Yield (keys, values, None) per layer in logical order, as DynamicCache does."""
        for layer in self.layers:
            yield layer.keys, layer.values, None
