"""The attention operator behind transformers' attention interface, with the mask that belongs to it.

Both are registered under the name "llmrt" when llmrt.llm is imported; nothing uses them until a model's
`set_attn_implementation("llmrt")` is called, which `optimize` does on the model that it returns.

The mask function returns what the operator can use without a mask of its own: None or a padding mask [B, T], where the
pattern is causal or a causal sliding window over the newest tokens. For every other pattern (packed sequences, bidirectional
or user-made functions, static caches whose buffer is longer than what is valid) it returns the whole bool mask [B, 1, S, T].
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)
from transformers.utils import is_tracing, output_capturing

from .. import ops

NAME = "llmrt"
_attention = ops.attention.overload

# A sliding window mask is a closure over (window overlay, causal); closures are recognized by the code they run.
_BOTH = sliding_window_causal_mask_function(1).__code__
_WINDOW = sliding_window_overlay(1).__code__


#: While a forward is captured: whether its calls have padding, which the values of a mask cannot tell then. None: look at them.
padding_is_known: ContextVar[bool | None] = ContextVar("padding_is_known", default=None)

_NO_WEIGHTS = (
    "output_attentions=True: llmrt's attention never makes the weights; "
    'call model.set_attn_implementation("eager") first'
)


def _asks_for_weights() -> bool:
    """Return whether the running forward was called with output_attentions=True (some modules drop that argument)."""
    collector = getattr(output_capturing, "_active_collector", None)
    if torch.compiler.is_dynamo_compiling() and not getattr(collector, "compiling", True):
        return False  # nobody asked within the graph, and Dynamo cannot read the context variable
    return collector is not None and "attentions" in (collector.get() or ())


def is_causal_pattern(mask_function: Callable[..., Any]) -> bool:
    """Return whether a transformers mask function is plain causal or a causal sliding window."""
    if mask_function is causal_mask_function:
        return True
    if getattr(mask_function, "__code__", None) is not _BOTH or not mask_function.__closure__:
        return False
    parts = mask_function.__closure__[0].cell_contents
    return (
        isinstance(parts, tuple)
        and len(parts) == 2
        and getattr(parts[0], "__code__", None) is _WINDOW
        and parts[1] is causal_mask_function
    )


def _is_causal(mask_function: Callable[..., Any], may_skip: bool, window: int | None, config: Any) -> bool:
    """Return `is_causal_pattern`; for Dynamo, which cannot look into a closure, from what transformers passes beside it.

    Where a function deviates from the pattern of its layer, transformers forbids to skip the mask; a local size is the window's
    unless the model attends in chunks.
    """
    if mask_function is causal_mask_function or not torch.compiler.is_dynamo_compiling():
        return is_causal_pattern(mask_function)
    windowed = window is not None and window == getattr(config, "sliding_window", None)
    return may_skip and windowed and getattr(config, "attention_chunk_size", None) is None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Return the mask for `attention_forward` (transformers' AttentionMaskInterface).

    Returns:
        None, bool [B, at least T] (True = attend) of which the last T columns belong to the keys, or bool [B, 1, S, T] which then
        says everything, causality included.
    """
    if q_length == 0:
        raise ValueError("the input has no token; pass at least one")
    if _asks_for_weights():
        raise ValueError(_NO_WEIGHTS)
    newest = not isinstance(q_offset, Tensor) and kv_offset + kv_length == q_offset + q_length
    if newest and _is_causal(mask_function, allow_is_causal_skip, kwargs.get("local_size"), kwargs.get("config")):
        known = None if torch.compiler.is_compiling() else padding_is_known.get()
        if attention_mask is None or known is False:
            return None
        if attention_mask.shape[-1] >= kv_offset + kv_length:
            # whole from the first token on: generate may hand the result to this function again
            padding = attention_mask[:, : kv_offset + kv_length]
            if known or is_tracing(padding):  # its values are not known, and the graph is to serve other prompts too
                return padding
            return None if bool(padding.all()) else padding
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        **kwargs,
    )


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    output_attentions: bool | None = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a `KVCache` or plain tensors (transformers' AttentionInterface).

    Args:
        module: the attention module, read for `is_causal` only.
        query: [B, H, S, D].
        key: [B, Hk, T, D]; a view that a `KVCache` returned carries its layer, and the cache is then read in place.
        value: [B, Hk, T, Dv].
        attention_mask: None, bool [B, at least T] (the last T columns count), or bool or float [B | 1, 1 | H, S, T].
        scaling: of the scores; None: 1 / sqrt(D).
        sliding_window: tokens that a query sees, itself included; not applied with a mask of four dimensions.
        softcap: c of c * tanh(s / c) on the scores.
        s_aux: [H], a sink logit per head.

    Returns:
        ([B, S, H, Dv], None).

    Raises:
        ValueError: for what this attention cannot do (dropout, attention weights as output, a position bias).
    """
    if dropout:
        raise ValueError(f"dropout is {dropout}; llmrt's attention is for inference: call model.eval()")
    if output_attentions:
        raise ValueError(_NO_WEIGHTS)
    if position_bias is not None or cache is not None:
        raise ValueError(f"{type(module).__name__}: llmrt's attention takes no position_bias and no paged cache")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    causal, window = True, sliding_window or 0
    layer = getattr(key, "_llmrt_layer", None)
    length = key.shape[2] if layer is None else layer.length
    if attention_mask is not None:
        if attention_mask.dim() == 4:
            causal, window = False, 0
        elif (older := attention_mask.shape[1] - length) > 0:
            attention_mask = attention_mask[:, older:]
    if is_causal is False or (is_causal is None and not getattr(module, "is_causal", True)):
        causal = False
    query = query.transpose(1, 2)
    if layer is None:
        out = _attention(
            query, key, value, length, scaling, causal, window, softcap or 0.0, attention_mask, None, s_aux
        )
        return out, None
    layer.claim(module)
    rows = layer.rows
    out = _attention(
        query,
        layer.key_cache,
        layer.value_cache,
        length,
        scaling,
        causal,
        window,
        softcap or 0.0,
        attention_mask,
        None,
        s_aux,
        rows.table,
        rows.beams,
    )
    return out, None


def register() -> None:
    """Register both functions under the name "llmrt" (additive; transformers' own entries stay)."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
