"""Published dimensions of known models: `llmrt bench --shape` builds them with random weights, so that no download is needed.

A row holds what the model's ``config.json`` on the hub says, as arguments of its transformers config class.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

#: What a row says in this order.
FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


def _row(model_type: str, *sizes: int, **more: Any) -> dict[str, Any]:
    """Return a row; sizes in the order of FIELDS."""
    return {"model_type": model_type, **dict(zip(FIELDS, sizes, strict=True)), **more}


def _llama3(factor: float, tied: bool) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "original_max_position_embeddings": 8192}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rms_norm_eps": 1e-5, "rope_parameters": rope, "tie_word_embeddings": tied}


def _theta(base: float, tied: bool) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base}, "tie_word_embeddings": tied}


#: Shape name -> model_type and config arguments.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _row("llama", 2048, 8192, 16, 32, 8, 128256, 131072, head_dim=64, **_llama3(32, True)),
    "llama-3.2-3b": _row("llama", 3072, 8192, 28, 24, 8, 128256, 131072, head_dim=128, **_llama3(32, True)),
    "llama-3.1-8b": _row("llama", 4096, 14336, 32, 32, 8, 128256, 131072, **_llama3(8, False)),
    "llama-2-7b": _row("llama", 4096, 11008, 32, 32, 32, 32000, 4096, rms_norm_eps=1e-5),
    "llama-2-13b": _row("llama", 5120, 13824, 40, 40, 40, 32000, 4096, rms_norm_eps=1e-5),
    "mistral-7b": _row("mistral", 4096, 14336, 32, 32, 8, 32768, 32768, sliding_window=None, **_theta(1e6, False)),
    "qwen2.5-0.5b": _row("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, **_theta(1e6, True)),
    "qwen2.5-7b": _row("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768, **_theta(1e6, False)),
    "qwen3-0.6b": _row("qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, head_dim=128, **_theta(1e6, True)),
    "qwen3-1.7b": _row("qwen3", 2048, 6144, 28, 16, 8, 151936, 40960, head_dim=128, **_theta(1e6, True)),
    "qwen3-4b": _row("qwen3", 2560, 9728, 36, 32, 8, 151936, 40960, head_dim=128, **_theta(1e6, True)),
    "qwen3-8b": _row("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, head_dim=128, **_theta(1e6, False)),
    "phi-3-mini": _row("phi3", 3072, 8192, 32, 32, 32, 32064, 4096, rms_norm_eps=1e-5, sliding_window=2047),
    "gemma-2-2b": _row("gemma2", 2304, 9216, 26, 8, 4, 256000, 8192, head_dim=256),
    "gemma-3-1b": _row("gemma3_text", 1152, 6912, 26, 4, 1, 262144, 32768, head_dim=256, sliding_window=512),
    "glm-4-9b": _row("glm", 4096, 13696, 40, 32, 2, 151552, 131072, head_dim=128, attention_bias=True),
    "olmoe-1b-7b": _row(
        "olmoe", 2048, 1024, 16, 16, 16, 50304, 4096, num_experts=64, num_experts_per_tok=8, rms_norm_eps=1e-5
    ),
    "tiny": _row("llama", 64, 160, 2, 4, 2, 264, 1024),
}

#: Shapes for tests, left out of lists that users see.
HIDDEN = frozenset({"tiny"})


def shape_names() -> list[str]:
    """Return the names that `llmrt bench --shape` offers."""
    return [name for name in SHAPES if name not in HIDDEN]


def shape_config(name: str, **changes: Any) -> PretrainedConfig:
    """Return the transformers config of a shape, with some of its fields changed.

    Raises:
        ValueError: for a name that is not in the table.
    """
    if name not in SHAPES:
        raise ValueError(f"shape '{name}' is unknown; known shapes: {', '.join(shape_names())}")
    row = {**SHAPES[name], **changes}
    return AutoConfig.for_model(row.pop("model_type"), **row)
