"""Tiny mixture-of-experts models, and their checkpoints with every expert quantized on its own."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from gptq_directories import edit_json, pack_linear
from models import BOS, EOS, PAD, VOCAB
from safetensors.torch import load_file, save_file

#: model_type -> (configuration, model, options of the configuration, names of an expert's gate, up and down in checkpoints).
EXPERT_MODELS: dict[str, tuple[str, str, dict[str, Any], tuple[str, str, str]]] = {
    "mixtral": (
        "MixtralConfig", "MixtralForCausalLM",
        {"num_local_experts": 4, "intermediate_size": 80}, ("w1", "w3", "w2"),
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 24, "norm_topk_prob": True, "mlp_only_layers": [0]},
        ("gate_proj", "up_proj", "down_proj"),
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM",
        {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 40},
        ("gate_proj", "up_proj", "down_proj"),
    ),
}  # fmt: skip
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "num_experts_per_tok": 2, "pad_token_id": PAD,
    "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip


@cache
def _built(name: str) -> Any:
    config, model, options, _ = EXPERT_MODELS[name]
    state = torch.random.get_rng_state()
    torch.manual_seed(sum(map(ord, name)))
    made = getattr(transformers, model)(getattr(transformers, config)(**{**COMMON, **options}))
    for key, parameter in made.named_parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(0, 0.25 if "embed" in key else parameter.shape[-1] ** -0.5 * 1.5)
        else:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    torch.random.set_rng_state(state)
    made.generation_config.eos_token_id = None
    return made.eval().requires_grad_(False)


def expert_model(name: str) -> Any:
    """Return a plain float32 model of two layers and four experts; do not change it."""
    return _built(name)


def experts_of(model: Any) -> dict[str, Any]:
    """Return the modules that hold experts in floating point."""
    return {
        n: m
        for n, m in model.named_modules()
        if getattr(m, "down_proj", None) is not None and "gate_up_proj" in m._parameters
    }


def dequantized_twin(name: str, optimized: Any) -> Any:
    """Return the plain model with the weights that a quantized one stands for."""
    from llmrt.llm.experts import QuantExperts
    from llmrt.llm.quantized import quantized_linears

    plain = copy.deepcopy(expert_model(name))
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.clone(), False)
    for path, module in optimized.named_modules():
        if isinstance(module, QuantExperts):
            for key, weight in module.dequantized().items():
                plain.get_submodule(path)._parameters[key].data = weight
    for linear in quantized_linears(optimized):
        if ".experts." not in linear.name:
            plain.get_submodule(linear.name).weight.data = linear.weight()
    return plain


def save_gptq_experts(name: str, directory: Path, act_order: bool = False) -> Any:
    """Write a GPTQ checkpoint whose experts alone are quantized, each linear on its own; return the plain model of the same values."""
    plain = copy.deepcopy(expert_model(name))
    gate, up, down = EXPERT_MODELS[name][3]
    plain.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for key in [k for k in tensors if ".experts." in k]:
        prefix, seed = key.removesuffix(".weight"), sum(map(ord, key))
        # a gate and its up have one order of columns
        parts, weight = pack_linear(*tensors.pop(key).shape[::-1], False, seed)
        if act_order:
            parts["g_idx"], weight = reordered(parts, sum(map(ord, prefix.replace(up, gate))))
        tensors.update({f"{prefix}.{k}": v for k, v in parts.items()})
        owner, _, number = prefix.rpartition(".")[0].rpartition(".")
        experts = plain.get_submodule(owner.replace("block_sparse_moe", "mlp"))
        last = prefix.rpartition(".")[2]
        if last == down:
            experts.down_proj.data[int(number)] = weight
        else:
            width = weight.shape[0]
            experts.gate_up_proj.data[int(number), (last == up) * width : (1 + (last == up)) * width] = weight
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": act_order, "sym": False}
    edit_json(directory / "config.json", lambda c: c.update(quantization_config=stored))
    return plain


def reordered(parts: dict[str, torch.Tensor], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return another g_idx for the tensors of a linear, and the weight [N, K] that they stand for with it."""
    order = torch.randperm(len(parts["g_idx"]), generator=torch.Generator().manual_seed(seed))
    g_idx = parts["g_idx"][order].contiguous()
    shifts = 4 * torch.arange(8)
    zeros = ((parts["qzeros"].unsqueeze(-1) >> shifts) & 15).flatten(1) + 1
    codes = ((parts["qweight"].unsqueeze(1) >> shifts.view(8, 1)) & 15).flatten(0, 1)
    return g_idx, ((codes - zeros[g_idx.long()]) * parts["scales"].float()[g_idx.long()]).T.contiguous()
