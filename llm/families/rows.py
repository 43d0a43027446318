"""The table. To add a family: a row here and a tiny configuration in tests/llm/models.py."""

from __future__ import annotations

from .family import Family, GatedFused, Plain

FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama"),
        Family("mistral"),
        Family("qwen2"),
        Family("qwen3"),
        Family("phi3", siblings=(), mlp=GatedFused()),
        Family("gemma", norm="rms_offset"),
        Family("gemma2", norm="rms_offset"),
        Family("gemma3_text", norm="rms_offset"),
        Family("glm", rope="interleaved", mlp=GatedFused()),
        Family("glm4", rope="interleaved", mlp=GatedFused()),
        Family("gpt_neox", norm="layer", siblings=(), mlp=Plain("dense_h_to_4h", "dense_4h_to_h")),
        Family("opt", norm="layer", rope=None, mlp=Plain("fc1", "fc2", "activation_fn"), positions="embed_positions"),
        Family("starcoder2", norm="layer", mlp=Plain("c_fc", "c_proj")),
        Family("gpt_bigcode", norm="layer", rope=None, siblings=(), mlp=Plain("c_fc", "c_proj"), positions="wpe"),
    )
}


def find_family(model_type: str) -> Family | None:
    """Return the row of a `config.model_type`, or None."""
    return FAMILIES.get(model_type)
