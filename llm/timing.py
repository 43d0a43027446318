"""Generation with its timings: how long the prompt took, and how long every token after it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList


@dataclass(frozen=True)
class GenerationTimings:
    """What one `generate` call cost.

    Args:
        prompt_tokens: tokens that were fed in the first forward pass (those in the cache already are not counted).
        prompt_seconds: from the call to the first token.
        generated_tokens: steps of generation; with beams every step extends all beams by one token.
        step_seconds: from the first token to the last.
        load_seconds: what loading the model took, if it was measured.
    """

    prompt_tokens: int
    prompt_seconds: float
    generated_tokens: int
    step_seconds: float
    load_seconds: float | None = None

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds

    @property
    def step_rate(self) -> float | None:
        """Tokens per second after the first token; None when there was only one."""
        return (self.generated_tokens - 1) / self.step_seconds if self.generated_tokens > 1 else None

    def __str__(self) -> str:
        """Return one line such as ``load 0.42 s, prompt 5 tokens (118.2 tok/s), generated 64 tokens (95.1 tok/s)``."""
        load = "" if self.load_seconds is None else f"load {self.load_seconds:.2f} s, "
        rate = "" if self.step_rate is None else f" ({self.step_rate:.1f} tok/s)"
        prompt = f"prompt {_count(self.prompt_tokens)} ({self.prompt_rate:.1f} tok/s)"
        return f"{load}{prompt}, generated {_count(self.generated_tokens)}{rate}"


def _count(tokens: int) -> str:
    return f"{tokens} token{'' if tokens == 1 else 's'}"


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given; the CPU has."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


class StepClock(StoppingCriteria):
    """Notes the time of every step, when its tokens are there, and never stops: unlike a streamer it also works with beams."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        synchronize(input_ids.device)
        self.stamps.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate_timed(
    model: Any, input_ids: Tensor, *, past_key_values: Any = None, **options: Any
) -> tuple[Any, GenerationTimings]:
    """Call ``model.generate`` and time its steps.

    Args:
        model: a transformers model with `generate`.
        input_ids: int64 [B, S], the whole sequence, without padding.
        past_key_values: cache that holds the first tokens of `input_ids` already; None for a new one.
        options: further arguments of `generate`.

    Returns:
        (what `generate` returned, timings).

    Raises:
        ValueError: the prompt is empty.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids has shape {list(input_ids.shape)}; expected [batch, tokens] with at least one token"
        )
    cached = 0 if past_key_values is None else past_key_values.get_seq_length()
    clock = StepClock()
    criteria = StoppingCriteriaList([*options.pop("stopping_criteria", ()), clock])
    start = time.perf_counter()
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        past_key_values=past_key_values,
        stopping_criteria=criteria,
        **options,
    )
    timings = GenerationTimings(
        prompt_tokens=input_ids.shape[1] - cached,
        prompt_seconds=clock.stamps[0] - start,
        generated_tokens=len(clock.stamps),
        step_seconds=clock.stamps[-1] - clock.stamps[0],
    )
    return output, timings
