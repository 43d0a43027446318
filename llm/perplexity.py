"""Perplexity of a language model on texts, over windows of equal length."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .cache import KVCache


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity.

    Args:
        value: exp of the mean negative log-likelihood (nats) per predicted token.
        windows: number of windows.
        window_length: tokens of one; all but the first are predicted.
        seconds: the forward passes took.
    """

    value: float
    windows: int
    window_length: int
    seconds: float

    @property
    def predicted_tokens(self) -> int:
        """Tokens that the mean is over."""
        return self.windows * (self.window_length - 1)


def token_windows(tokenizer: Any, texts: Iterable[str], length: int = 512, limit: int | None = None) -> Tensor:
    """Return the texts' tokens cut into windows: int64 [windows, length].

    The texts are joined, each between the tokenizer's bos and eos tokens (where it has them); the rest that does not fill
    a window is dropped.

    Args:
        tokenizer: a transformers tokenizer.
        texts: the texts, in order.
        length: tokens per window, at least 2.
        limit: at most so many windows.

    Raises:
        ValueError: length or limit is too small, or the texts do not fill one window.
    """
    if length < 2:
        raise ValueError(f"window length is {length}; valid: at least 2")
    if limit is not None and limit < 1:
        raise ValueError(f"number of windows is {limit}; valid: at least 1")
    before = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    after = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    tokens: list[int] = []
    for text in texts:
        # A text is longer than the model's maximum as a rule: `verbose` silences the warning about it.
        tokens += [*before, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *after]
        if limit is not None and len(tokens) >= limit * length:
            break
    count = len(tokens) // length if limit is None else min(limit, len(tokens) // length)
    if count == 0:
        raise ValueError(f"the texts have {len(tokens)} tokens; one window needs {length}")
    return torch.tensor(tokens[: count * length]).view(count, length)


@torch.inference_mode()
def perplexity(
    model: Any, windows: Tensor, progress: Callable[[int, float], None] | None = None, cached: bool = False
) -> Perplexity:
    """Return the perplexity of `model` over windows [N, length]; every window is seen on its own, from position 0.

    Args:
        model: a causal language model of transformers.
        windows: int64 [N, length].
        progress: called after every window with the number of windows done and the perplexity so far.
        cached: read keys and values back from a `KVCache`, which stores them as `optimize` was told; needs an optimized model.
    """
    total, start = 0.0, time.perf_counter()
    for done, window in enumerate(windows.to(model.device), 1):
        cache = {"past_key_values": KVCache(model.config, max_length=windows.shape[1])} if cached else {}
        logits = model(window[None], use_cache=cached, **cache).logits[0, :-1].float()
        total += cross_entropy(logits, window[1:]).item()
        if progress is not None:
            progress(done, math.exp(total / done))
    count, length = windows.shape
    return Perplexity(math.exp(total / count), count, length, time.perf_counter() - start)
