"""Directories of foreign formats, end to end: logits and tokens of the loaded model are those of the dequantized one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from integer_packers import Integers, awq_tensors, gptq_tensors, random_integers, shuffled
from models import CountOperators, error, padded_batch, tiny_model
from safetensors.torch import save_file
from torch import Tensor, nn

from llmrt import llm

Packed = tuple[Integers, dict[str, Tensor]]


class Case(NamedTuple):
    """A quantization_config and what it makes of one linear [N, K]; None: the linear stays floating point."""

    config: dict[str, Any]
    pack: Callable[[str, int, int], Packed | None]
    family: str = "llama"


def gptq(bits: int, group: int, version: int, zero: tuple[int, int] | None = None, **config: Any) -> Case:
    def pack(name: str, n: int, k: int) -> Packed:
        weight = random_integers(n, k, group, bits, config.get("sym", False), zero)
        weight = shuffled(weight) if config.get("desc_act") else weight
        return weight, gptq_tensors(weight, bits, version)

    kind = {1: "gptq", 2: "gptq_v2"}[version]
    return Case({"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": kind, **config}, pack)


def gptq_dynamic() -> Case:
    def pack(name: str, n: int, k: int) -> Packed | None:
        if "layers.0" in name and "mlp" in name:
            return None
        bits, group = (8, -1) if "down_proj" in name else (4, 16)
        weight = random_integers(n, k, group, bits)
        return weight, gptq_tensors(weight, bits)

    dynamic = {r"-:.*layers\.0\.mlp.*": {}, r"+:.*down_proj": {"bits": 8, "group_size": -1}}
    return Case({"quant_method": "gptq", "bits": 4, "group_size": 16, "dynamic": dynamic}, pack, "qwen2")


def awq(method: str = "awq", **config: Any) -> Case:
    def pack(name: str, n: int, k: int) -> Packed:
        weight = random_integers(n, k, 16, 4, zero=(0, 15))
        return weight, awq_tensors(weight)

    return Case({"quant_method": method, "bits": 4, "group_size": 16, **config}, pack)


def auto_round_mixed() -> Case:
    def pack(name: str, n: int, k: int) -> Packed:
        bits = 2 if ".1." in name else 4
        weight = random_integers(n, k, 16, bits)
        return weight, gptq_tensors(weight, bits, 2, g_idx=False)

    values = {"bits": 4, "group_size": 16, "sym": False, "packing_format": "auto_round:gptqmodel"}
    return Case({"quant_method": "auto-round", **values, "extra_config": {r".*\.1\..*": {"bits": 2}}}, pack)


CASES = {
    "gptq v1": gptq(4, 32, 1, sym=False),
    "gptq v1, zeros to 16": gptq(4, 16, 1, zero=(1, 16), sym=False),
    "gptq v2 act-order": gptq(4, 16, 2, sym=False, desc_act=True),
    "gptq 3 bits sym": gptq(3, -1, 1, sym=True),
    "gptq 8 bits": gptq(8, 16, 1, sym=False),
    "gptq dynamic": gptq_dynamic(),
    "awq": awq(zero_point=True, version="gemm"),
    "auto-round awq": awq("auto-round", sym=False, packing_format="auto_round:auto_awq"),
    "auto-round mixed": auto_round_mixed(),
}


def save(case: Case, directory: Path) -> tuple[Any, int]:
    """Write a directory; return the dequantized model and how many linears are quantized."""
    model = copy.deepcopy(tiny_model(case.family))
    tensors, count = {key: t.clone() for key, t in model.state_dict().items()}, 0
    for name, module in model.named_modules():
        packed = None
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed = case.pack(name, module.out_features, module.in_features)
        if packed is None:
            continue
        weight, parts = packed
        scale = module.weight.std() / weight.weight.std()  # as large as the model's own: attention stays sensible
        parts["scales"] = (weight.scales * scale).to(torch.float16).t().contiguous()
        module.weight.data = weight._replace(scales=parts["scales"].t()).weight.float()
        del tensors[f"{name}.weight"]
        tensors.update({f"{name}.{key}": part for key, part in parts.items()})
        count += 1
    model.config.save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    content = {**json.loads(path.read_text()), "quantization_config": case.config, "dtype": "float32"}
    path.write_text(json.dumps(content))
    return model, count


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_logits_and_tokens(case: Case, tmp_path: Path) -> None:
    plain, linears = save(case, tmp_path)
    assert linears == (11 if case.family == "qwen2" else 14)
    loaded = llm.AutoModelForCausalLM.from_pretrained(tmp_path, compute_dtype="fp32")
    loaded.generation_config.eos_token_id = None  # as of the tiny model
    batch = padded_batch()
    with CountOperators() as count:
        logits = loaded(**batch).logits
    assert count["quant_linear"] >= 4
    assert error(logits, plain(**batch).logits, batch["attention_mask"]) < 1e-5
    assert torch.equal(
        loaded.generate(**batch, max_new_tokens=6, do_sample=False),
        plain.generate(**batch, max_new_tokens=6, do_sample=False),
    )
