"""Tiny random models for the compile backend: the families of models.py, and older ones that llm.optimize does not know."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from models import BOS, EOS, MODELS, PAD, VOCAB
from transformers.modeling_outputs import BaseModelOutput


@dataclass(frozen=True)
class Entry:
    """A model's class and the options of its configuration, under that configuration's own names.

    Args:
        config: class name of the configuration.
        model: class name of the model.
        options: of the configuration, beside the vocabulary and the number of layers.
    """

    config: str
    model: str
    options: tuple[tuple[str, Any], ...]


def _entry(name: str, model: str = "ForCausalLM", **options: Any) -> Entry:
    return Entry(f"{name}Config", f"{name}{model}", tuple(options.items()))


_FALCON = {"hidden_size": 48, "num_attention_heads": 4, "max_position_embeddings": 128}
_T5 = {"d_model": 48, "d_kv": 12, "d_ff": 80, "num_heads": 4, "decoder_start_token_id": PAD}

OLDER = {
    "gptj": _entry("GPTJ", n_embd=48, n_head=4, rotary_dim=8, n_positions=128),
    "codegen": _entry("CodeGen", n_embd=48, n_head=4, rotary_dim=8, n_positions=128),
    "falcon": _entry("Falcon", num_kv_heads=2, new_decoder_architecture=True, **_FALCON),
    "falcon_mqa": _entry("Falcon", multi_query=True, parallel_attn=True, **_FALCON),
    "falcon_alibi": _entry("Falcon", multi_query=False, parallel_attn=False, alibi=True, bias=True, **_FALCON),
    "bloom": _entry("Bloom", hidden_size=48, n_head=4),
    "mpt": _entry("Mpt", d_model=48, n_heads=4, max_seq_len=128, use_cache=True),
    "t5": _entry("T5", "ForConditionalGeneration", feed_forward_proj="relu", **_T5),
    "t5_gated": _entry("T5", "ForConditionalGeneration", feed_forward_proj="gated-gelu", **_T5),
}

FAMILIES = (*MODELS, *OLDER)

#: Layers of a family's model: 2 where the second layer's attention is of another kind than the first one's.
LAYERS = {"qwen2": 2, "gemma2": 2, "gemma3": 2}

CACHES = ("dynamic", "static")

#: What transformers itself cannot capture as one graph with a kind of cache, whatever the backend, and why.
NO_FULLGRAPH = {("mpt", "static"): "slices the ALiBi bias by the cache's length, a tensor: Tensor.item()"}

#: What transformers itself cannot generate with a kind of cache, and why.
NO_GENERATE = {
    ("falcon_alibi", "static"): "generate passes a 4D mask, the ALiBi bias is made from a 2D one: ValueError"
}


def _entry_of(name: str) -> Entry:
    if name in OLDER:
        return OLDER[name]
    tiny = MODELS[name]
    options = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "max_position_embeddings": 128}
    if tiny.gqa:
        options["num_key_value_heads"] = 2
    return Entry(tiny.config, tiny.model, tuple({**options, **dict(tiny.options)}.items()))


@cache
def _built(name: str, layers: int) -> Any:
    entry = _entry_of(name)
    options = dict(entry.options) | {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    if "layer_types" in options:
        options["layer_types"] = [options["layer_types"][i % 2] for i in range(layers)]
    config_class = getattr(transformers, entry.config)
    options[config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layers
    state = torch.random.get_rng_state()
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, entry.model)(config_class(**options)).eval().requires_grad_(False)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for parameter in model.parameters():
        # large enough for distinct tokens; norms and biases away from their trivial values
        if parameter.dim() == 2:
            parameter.normal_(0, 0.25 if id(parameter) in tables else parameter.shape[1] ** -0.5 * 1.5)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    torch.random.set_rng_state(state)
    model.generation_config.eos_token_id = None  # always as many tokens as asked for
    return model


def small_model(name: str, layers: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """Return a plain model of a family, a new one at every call; its buffers stay as they are."""
    model = copy.deepcopy(_built(name, layers))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


class Decoding:
    """A batch of left-padded prompts that a model is run on, forward after forward, with a cache it was given.

    Args:
        model: the plain model.
        kind: of cache, "dynamic" or "static".
        run: what is called, the model or a compiled one.
        batch: "input_ids" and "attention_mask" [B, S].
        length: tokens that a static cache holds.
    """

    def __init__(self, model: Any, kind: str, run: Any, batch: dict[str, torch.Tensor], length: int = 32) -> None:
        self.config, self.run, self.length = model.config, run, length
        self.mask, prompt = batch["attention_mask"], batch["input_ids"].shape[1]
        # the bias of ALiBi is made from the mask: one for the whole of a static cache, as `generate` makes it
        alibi = model.config.model_type == "bloom" or getattr(model.config, "alibi", False)
        self.whole_mask = kind == "static" and alibi
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.cache = self._new_cache(kind, length)
        if model.config.is_encoder_decoder:
            state = model.encoder(**batch).last_hidden_state
            self.encoder = {"encoder_outputs": BaseModelOutput(last_hidden_state=state), "attention_mask": self.mask}
            self.cache = transformers.EncoderDecoderCache(self.cache, self._new_cache(kind, prompt))

    def _new_cache(self, kind: str, length: int) -> Any:
        config = self.config.get_text_config(decoder=True)
        if kind == "dynamic":
            return transformers.DynamicCache(config=config)
        return transformers.StaticCache(config=config, max_cache_len=length)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, S, V] of the next tokens [B, S]: the prompts, then one token for each."""
        if self.config.is_encoder_decoder:
            inputs = {**self.encoder, "decoder_input_ids": tokens}
        else:
            if tokens.shape[1] == 1:
                self.mask = torch.cat([self.mask, torch.ones_like(tokens)], 1)
            inputs = {"input_ids": tokens, "attention_mask": self.mask}
            if self.takes_positions:
                inputs["position_ids"] = self.mask.cumsum(1).sub(1).clamp(min=0)[:, -tokens.shape[1] :]
            if self.whole_mask:
                inputs["attention_mask"] = torch.nn.functional.pad(self.mask, (0, self.length - self.mask.shape[1]))
        return self.run(**inputs, past_key_values=self.cache, use_cache=True).logits
