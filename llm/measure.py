"""Measuring a model through its own `generate`: latencies, the work that a token costs, and the machine's limits."""

from __future__ import annotations

import itertools
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
)

from .. import _C, ops
from . import doctor
from .experts import QuantExperts, is_experts, sizes_of
from .timing import StepClock, synchronize


@dataclass(frozen=True)
class Workload:
    """What one measured `generate` call does.

    Args:
        prompt: tokens of the prompt, per sequence.
        new: tokens generated, per sequence.
        depth: tokens that are in the cache before the (timed) prompt.
        batch: sequences.
        beams: beams per sequence, 1 for greedy.

    Raises:
        ValueError: for a value out of range, or a depth with beams.
    """

    prompt: int = 512
    new: int = 64
    depth: int = 0
    batch: int = 1
    beams: int = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        for name, least in (("prompt", 1), ("new", 2), ("depth", 0), ("batch", 1), ("beams", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: at least {least}")
        if self.depth and self.beams > 1:
            raise ValueError(
                f"depth is {self.depth} with {self.beams} beams; a depth needs beams = 1 (use a longer prompt)"
            )

    @property
    def length(self) -> int:
        """Longest sequence in tokens."""
        return self.depth + self.prompt + self.new

    def check_length(self, config: PretrainedConfig) -> None:
        """Raise ValueError if a sequence is longer than the model's maximum."""
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        if most and self.length > most:
            raise ValueError(f"depth + prompt + new is {self.length} tokens; the model's maximum is {most}")


@dataclass(frozen=True)
class Work:
    """What a model's tokens cost, whatever kernels run it.

    Args:
        weight_bytes: read for one decode step of one sequence: every parameter but the embedding table (of which one row is read)
            and the experts that a token does not choose.
        layer_macs: multiply-accumulates of all linears but the head, per token.
        head_macs: of the head, per sequence and step.
        kv_bytes: of one token in one full-attention layer's cache, key and value.
        windows: per layer, how many cached tokens a query sees at most; 0 for all.
    """

    weight_bytes: int
    layer_macs: int
    head_macs: int
    kv_bytes: int
    windows: tuple[int, ...]

    def cache_bytes(self, load: Workload) -> float:
        """Return the mean bytes of keys and values that one decode step of a workload reads."""
        start, total = load.depth + load.prompt, 0.0
        steps = range(1, load.new)
        for window in self.windows:
            for step in steps:
                tokens = min(start + step, window or start + step)
                # The prompt's keys are stored and read once per sequence, whatever the number of beams.
                own = min(step, tokens)
                total += load.batch * (tokens - own + own * load.beams)
        return total * self.kv_bytes / len(steps)

    def prompt_ops(self, load: Workload) -> float:
        """Return the operations (two per multiply-accumulate) of a prompt's linears; the head runs on its last token only."""
        return 2.0 * load.batch * (load.prompt * self.layer_macs + self.head_macs)


def count_work(model: PreTrainedModel, dtype: torch.dtype) -> Work:
    """Return what one token of a (float or optimized) model costs; `dtype` is that of the cache."""
    found: dict[int, int] = {}
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            chosen, count = _chosen(module, model.config)
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                found[tensor.data_ptr()] = tensor.nbytes * chosen // count
    return count_shape(model.config, dtype, sum(found.values()))


def _chosen(module: nn.Module, config: PretrainedConfig) -> tuple[int, int]:
    """Return how many of a module's experts a token goes to, and how many there are; (1, 1) for other modules."""
    count = module.sizes.experts if isinstance(module, QuantExperts) else 0
    count = sizes_of(module).experts if is_experts(module) else count
    chosen = getattr(config.get_text_config(), "num_experts_per_tok", None)
    return (chosen, count) if count and isinstance(chosen, int) and chosen <= count else (1, 1)


def count_shape(config: PretrainedConfig, dtype: torch.dtype, weight_bytes: int) -> Work:
    """Return what one token of a model with this config costs.

    Args:
        config: the model's.
        dtype: of the cache.
        weight_bytes: of the weights that one decode step reads.
    """
    layer_macs, head_macs = count_macs(config)
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or (1 if getattr(text, "multi_query", False) else heads)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Work(
        weight_bytes,
        layer_macs,
        head_macs,
        2 * kv_heads * ops.stored_width(head_dim, dtype) * dtype.itemsize,
        _windows(text),
    )


def count_macs(config: PretrainedConfig) -> tuple[int, int]:
    """Return multiply-accumulates per token of (all linears but the head, the head)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    head_macs = head.weight.numel() if head is not None else 0
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    macs = sum(m.weight.numel() for m in linears)
    for module in filter(is_experts, model.modules()):
        chosen, count = _chosen(module, config)
        macs += sum(p.numel() for p in module.parameters(recurse=False)) * chosen // count
    return macs, head_macs


def _windows(text: PretrainedConfig) -> tuple[int, ...]:
    window = getattr(text, "sliding_window", None) or 0
    kinds = (
        getattr(text, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    )
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


@dataclass(frozen=True)
class Timing:
    """Latencies of one `generate` call in seconds: the first token, and each one after it."""

    first: float
    next: tuple[float, ...]


class Stopwatch:
    """Runs `generate` on random tokens and times every token, through a stopping criterion that only notes the time.

    A token's latency runs from one token's choice to the next one's, so that the loop around the model counts; the first token's
    starts with the call of `generate`.
    """

    def __init__(
        self, model: PreTrainedModel, load: Workload, seed: int = 0, new_cache: Callable[[], Any] | None = None
    ) -> None:
        """Check the workload against the model and draw the tokens.

        Args:
            model: to be timed.
            load: the workload.
            seed: of the tokens.
            new_cache: makes the cache that a run begins with; None leaves that to `generate`.
        """
        load.check_length(model.config)
        self.model, self.load, self.new_cache = model, load, new_cache
        self._past: Any = None
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(
            model.config.get_text_config().vocab_size, (load.batch, load.depth + load.prompt), generator=generator
        ).to(model.device)
        # No end-of-sequence token: every run makes exactly `new` tokens.
        self.settings = GenerationConfig(
            max_new_tokens=load.new,
            num_beams=load.beams,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
        )

    def run(self) -> Timing:
        """Time one `generate` call.

        Raises:
            RuntimeError: `generate` made another number of steps than tokens.
        """
        clock = StepClock()
        kept = self.model.generation_config
        self.model.generation_config = self.settings
        try:
            extra = {}
            if self.load.depth:
                extra["past_key_values"] = self._prefix()
            elif self.new_cache is not None:
                extra["past_key_values"] = self.new_cache()
            synchronize(self.tokens.device)
            start = time.perf_counter()
            self.model.generate(
                self.tokens,
                attention_mask=torch.ones_like(self.tokens),
                generation_config=self.settings,
                stopping_criteria=StoppingCriteriaList([clock]),
                **extra,
            )
            synchronize(self.tokens.device)
            end = time.perf_counter()
        finally:
            self.model.generation_config = kept
        if len(clock.stamps) != self.load.new:
            raise RuntimeError(f"generate made {len(clock.stamps)} steps for {self.load.new} tokens")
        stamps = [*clock.stamps[:-1], end]
        return Timing(stamps[0] - start, tuple(b - a for a, b in itertools.pairwise(stamps)))

    def _prefix(self) -> Any:
        """Return a cache, of the kind that the model uses by default, that holds the first `depth` tokens."""
        past, depth = self._past, self.load.depth
        if past is not None and all(getattr(layer, "is_croppable", False) for layer in past.layers):
            past.crop(depth - past.get_seq_length())
            return past
        tokens = self.tokens[:, :depth]
        settings = GenerationConfig(
            **{**self.settings.to_diff_dict(), "max_new_tokens": 1, "return_dict_in_generate": True}
        )
        extra = {} if self.new_cache is None else {"past_key_values": self.new_cache()}
        result = self.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), generation_config=settings, **extra
        )
        self._past = result.past_key_values
        return self._past


def summarize(timings: Iterable[Timing], load: Workload) -> dict[str, Any]:
    """Return medians over iterations: latencies in ms, prefill and decode tokens per second of all sequences together."""
    runs = list(timings)
    tokens = sorted(t for run in runs for t in run.next)
    first = statistics.median(run.first for run in runs)
    step = statistics.median(statistics.fmean(run.next) for run in runs)
    return {
        "first_token_ms": first * 1e3,
        "next_token_ms": statistics.median(tokens) * 1e3,
        "next_token_p90_ms": tokens[min(len(tokens) - 1, int(0.9 * len(tokens)))] * 1e3,
        "prefill_tokens_per_s": load.batch * load.prompt / first,
        "decode_tokens_per_s": load.batch / step,
        "iterations": [{"first_token_ms": r.first * 1e3, "next_token_ms": [t * 1e3 for t in r.next]} for r in runs],
    }


def relate(
    results: dict[str, Any], work: Work, load: Workload, peaks: Mapping[str, float | None], unit: str
) -> dict[str, Any]:
    """Return how near results come to the machine's limits.

    Args:
        results: of `summarize`.
        work: what a token costs.
        load: the workload.
        peaks: of `machine_peaks`.
        unit: which compute peak bounds the prompt: "int8", "bf16" or "fp32".

    Returns:
        GB read per decode step and Gop per prompt, and both rates as percent of `peaks`; null where the machine lacks the
        unit. Attention's own operations are not counted.
    """
    read = work.weight_bytes + work.cache_bytes(load)
    ops = work.prompt_ops(load)
    steps_per_s = results["decode_tokens_per_s"] / load.batch
    bandwidth, limit = peaks["read"], peaks[unit]
    return {
        "gb_per_step": read / 1e9,
        "percent_of_read_bandwidth": 100 * read * steps_per_s / bandwidth if bandwidth else None,
        "gop_per_prompt": ops / 1e9,
        "compute_unit": unit,
        "percent_of_compute_peak": 100 * ops / (results["first_token_ms"] / 1e3) / limit if limit else None,
    }


def machine_peaks() -> dict[str, float | None]:
    """Return the limits that `llmrt doctor` measures, with torch's present number of threads."""
    return doctor.measured_peaks(torch.get_num_threads())


def machine() -> dict[str, Any]:
    """Return what a result depends on besides the code: CPU, tier, threads and versions."""
    return {
        "cpu": doctor.cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _C.cpu_isa(),
        "versions": doctor.versions(),
    }


def peak_memory_bytes() -> int:
    """Return the largest resident size that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def workload_fields(load: Workload) -> dict[str, int]:
    """Return the workload for a JSON file."""
    return asdict(load)
