"""Makes `generate` of one model use a `KVCache` by default."""

from __future__ import annotations

from typing import Any

from . import attention
from .cache import KV_DTYPE, KVCache
from .stand_in import StandIn


def _is_default(implementation: str | None, stored: Any) -> bool:
    """Return whether nobody asked for this cache: the hub's files of some models name the old hybrid cache."""
    return implementation in (None, "dynamic") or implementation == stored.cache_implementation == "hybrid"


class CacheSetup(StandIn):
    """Stands for a model's `_prepare_cache_for_generation`: where `generate` would make a DynamicCache, it gets a `KVCache`."""

    def __call__(
        self, generation_config: Any, model_kwargs: Any, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        """Put a cache into model_kwargs, as the method of transformers' GenerationMixin does."""
        model = self.model
        ours = (
            model_kwargs.get("past_key_values") is None
            and generation_config.use_cache is not False
            and _is_default(generation_config.cache_implementation, model.generation_config)
            and model.config._attn_implementation == attention.NAME
        )
        asked = getattr(model.config.get_text_config(decoder=True), KV_DTYPE, None)
        if not ours and asked is not None and model_kwargs.get("past_key_values") is None:
            named = generation_config.cache_implementation
            if generation_config.use_cache is not False and named is not None:
                raise ValueError(
                    f"cache_implementation is {named!r}, which stores keys and values in the model's dtype; the model was optimized "
                    f"with kv_dtype={asked!r}: leave cache_implementation out"
                )
        if not ours:
            return type(model)._prepare_cache_for_generation(
                model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        beams = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs["past_key_values"] = KVCache(model.config, max_length=max(1, max_cache_length), beams=beams)
        return None
