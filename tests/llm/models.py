"""Tiny random models of every family: two layers, float32, and what each of them is made of."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB = 96
PAD, BOS, EOS = 0, 1, 2


@dataclass(frozen=True)
class Tiny:
    """A family's tiny model.

    Args:
        config: class name of the configuration.
        model: class name of the model.
        options: of the configuration, beside the common ones.
        norms: norm modules in the whole model.
        linears: of one layer, after siblings and gate/up became one.
        gated: "silu_mul" or "gelu_mul" if the feed-forward part is gated.
        rope: whether there is a rotation.
        common: names under which this configuration knows hidden size, layers, heads and so on.
    """

    config: str
    model: str
    norms: int
    linears: int
    gated: str | None = "silu_mul"
    rope: bool = True
    options: tuple[tuple[str, Any], ...] = ()
    gqa: bool = True


def _tiny(name: str, norms: int, linears: int = 4, text: str = "", **options: Any) -> Tiny:
    fields = {k: options.pop(k) for k in ("gated", "rope", "gqa") if k in options}
    return Tiny(f"{name}{text}Config", f"{name}ForCausalLM", norms, linears, options=tuple(options.items()), **fields)


# linears of a layer: qkv, o, gate_up, down
MODELS = {
    "llama": _tiny("Llama", 5),
    "mistral": _tiny("Mistral", 5, sliding_window=7),
    "qwen2": _tiny("Qwen2", 5, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": _tiny("Qwen3", 9, head_dim=24),
    "phi3": _tiny("Phi3", 5, sliding_window=None, pad_token_id=PAD),
    "gemma": _tiny("Gemma", 5, gated="gelu_mul", head_dim=24),
    "gemma2": _tiny("Gemma2", 9, gated="gelu_mul", head_dim=24, sliding_window=6, query_pre_attn_scalar=24),
    "gemma3": _tiny(
        "Gemma3", 13, text="Text", gated="gelu_mul", head_dim=24, sliding_window=6, query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "glm": _tiny("Glm", 5, head_dim=16, pad_token_id=PAD),
    "glm4": _tiny("Glm4", 9, head_dim=16, pad_token_id=PAD),
    "gpt_neox": _tiny("GPTNeoX", 5, gated=None, gqa=False),
    "opt": _tiny("OPT", 5, gated=None, rope=False, gqa=False, ffn_dim=80, word_embed_proj_dim=48),
    "starcoder2": _tiny("Starcoder2", 5, gated=None, sliding_window=8),
    "gpt_bigcode": _tiny("GPTBigCode", 5, gated=None, rope=False, gqa=False, n_inner=80),
}  # fmt: skip


@cache
def _built(name: str) -> Any:
    tiny = MODELS[name]
    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    if tiny.gqa:
        options["num_key_value_heads"] = 2
    config = getattr(transformers, tiny.config)(**{**options, **dict(tiny.options)})
    state = torch.random.get_rng_state()
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, tiny.model)(config).eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        # large enough for distinct tokens; norms and biases away from their trivial values
        if parameter.dim() == 2:
            parameter.normal_(0, 0.25 if "embed" in key or "wte" in key else parameter.shape[1] ** -0.5 * 1.5)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    torch.random.set_rng_state(state)
    model.generation_config.eos_token_id = None  # always as many tokens as asked for
    return model


def tiny_model(name: str) -> Any:
    """Return the plain model of a family, float32, the same at every call; do not change it."""
    return _built(name)


def padded_batch(batch: int = 3, tokens: int = 11) -> dict[str, torch.Tensor]:
    """Return a batch of left-padded prompts of different lengths."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCAB, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        ids[row, : 3 * row], mask[row, : 3 * row] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def dequantized(name: str, optimized: Any) -> Any:
    """Return the plain model with the weights that a quantized one stands for, float32."""
    from llmrt.llm.linear import QuantLinear, SiblingLinear
    from llmrt.llm.mlp import QuantGatedMLP

    plain = copy.deepcopy(tiny_model(name))
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.clone(), False)  # apart from a tied embedding
    weights = {}
    for path, module in optimized.named_modules():
        if isinstance(module, QuantLinear | SiblingLinear) and not path.endswith(".group"):
            weights[path] = module.dequantized()
        elif isinstance(module, QuantGatedMLP):
            weights.update({f"{path}.{key}": weight for key, weight in module.dequantized().items()})
    for path, weight in weights.items():
        plain.get_submodule(path).weight.data = weight
    linears = [path for path, module in plain.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(weights) == sorted(linears), "every linear is quantized"
    return plain


class CountOperators(TorchDispatchMode):
    """Counts calls of llmrt's operators: ``with CountOperators() as calls: ...; calls["rope"]``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "llmrt":
            self.calls[func.__name__.removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))

    def __getitem__(self, name: str) -> int:
        return self.calls[name]


def error(got: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Return the largest difference at positions that are no padding, relative to the largest value."""
    difference = (got.double() - expected.double()).abs()
    if mask is not None:
        difference, expected = difference[mask.bool()], expected[mask.bool()]
    return float(difference.max() / expected.abs().max())
