"""Directories of quantized checkpoints, saved as their own packages save them, load packed and compute what they stand for."""

import copy
import json

import pytest
import torch
from models import CountOperators, tiny_model
from safetensors.torch import save_file
from torch import Tensor

from llmrt import llm
from llmrt.llm.quantized import quantized_linears


def in_words(codes: Tensor) -> Tensor:
    """Return unsigned 4-bit codes [N, K], K a multiple of 8, as int32 words."""
    shifted = codes.long().unflatten(1, (-1, 8)) << (4 * torch.arange(8))
    words = shifted.sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def pack_quantized(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return tensors of compressed-tensors, groups of 16 columns chosen by an act-order, and the weight."""
    n, k = weight.shape
    order = torch.randperm(k)
    index = torch.empty(k, dtype=torch.int32)
    index[order] = torch.arange(k, dtype=torch.int32) // 16
    groups = weight[:, order].unflatten(1, (-1, 16))
    scale = groups.abs().amax(-1) / 7
    zero = torch.randint(-1, 2, scale.shape)
    codes = (groups / scale.unsqueeze(-1)).round().add(zero.unsqueeze(-1)).clamp(-8, 7)
    stands_for = torch.empty_like(weight)
    stands_for[:, order] = ((codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)
    stored = torch.empty(n, k)
    stored[:, order] = codes.flatten(1)
    return {
        "weight_packed": in_words(stored + 8), "weight_scale": scale, "weight_shape": torch.tensor([n, k]),
        "weight_zero_point": in_words((zero + 8).t().contiguous()).t().contiguous(), "weight_g_idx": index,
    }, stands_for  # fmt: skip


def by_rows(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def by_blocks(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    n, k = weight.shape
    scale = torch.rand(-(-n // 32), -(-k // 32)) / 100 + 0.01
    spread = scale.repeat_interleave(32, 0)[:n].repeat_interleave(32, 1)[:, :k]
    codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * spread


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16, "actorder": "group"}
FORMATS = {
    "compressed-tensors": (
        pack_quantized,
        {"format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}},
        {"ignore": ["lm_head"]},
    ),
    "w8a8_int8": (by_rows, {}, {"ignore": ["lm_head"]}),
    "fp8": (by_blocks, {"weight_block_size": [32, 32]}, {"modules_to_not_convert": ["lm_head"]}),
}


def write_directory(directory, method):
    """Write tiny Llama as a checkpoint of a format; return its dequantized weights by name."""
    quantize, config, ignored = FORMATS[method]
    model = tiny_model("llama")
    tensors, stands_for = {}, {}
    for name, tensor in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor.clone()
            continue
        parts, stands_for[name] = quantize(tensor)
        tensors |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
    model.config.save_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": method, **config, **ignored}
    (directory / "config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return stands_for


@pytest.mark.parametrize("method", FORMATS)
def test_logits_are_those_of_the_dequantized_model(tmp_path, method):
    stands_for = write_directory(tmp_path, method)
    loaded = llm.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, compute_dtype="fp32")
    weights = dict(stored_weights(loaded))
    assert len(weights) == 14
    for name, weight in weights.items():
        assert torch.equal(weight, stands_for[f"{name}.weight"]), name
    ids = torch.arange(3, 17).view(2, 7)
    with CountOperators() as calls:
        logits = loaded(ids, use_cache=False).logits
    assert calls["quant_linear"] > 0
    plain = dequantized_model(stands_for)
    torch.testing.assert_close(logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def stored_weights(model):
    return ((linear.name, linear.weight()) for linear in quantized_linears(model))


def dequantized_model(weights):
    plain = copy.deepcopy(tiny_model("llama"))
    plain.load_state_dict(weights, strict=False)
    return plain
