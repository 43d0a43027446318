"""Checkpoints of other formats with every expert quantized on its own."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import EXPERT_MODELS, expert_model, experts_of, save_gptq_experts
from gptq_directories import edit_json
from models import CountOperators, error, padded_batch
from safetensors.torch import load_file, save_file

from llmrt import llm
from llmrt.llm.experts import QuantExperts

NAMES = pytest.mark.parametrize("name", EXPERT_MODELS)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}


def edit_tensors(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def same_experts(fast: Any, plain: Any) -> None:
    """The experts stand for exactly the weights of the plain model."""
    for path, module in experts_of(plain).items():
        found = fast.get_submodule(path).dequantized()
        assert torch.equal(found["gate_up_proj"], module.gate_up_proj), path
        assert torch.equal(found["down_proj"], module.down_proj), path


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@NAMES
def test_gptq(name: str, act_order: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain, batch = save_gptq_experts(name, tmp_path, act_order), padded_batch()
    fast = llm.AutoModelForCausalLM.from_pretrained(tmp_path, compute_dtype="fp32", strict=True)
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    same_experts(fast, plain)
    with CountOperators() as calls:
        logits = fast(**batch).logits
    assert calls["quant_experts"] == len(experts_of(plain))
    assert error(logits, plain(**batch).logits, batch["attention_mask"]) < 2e-5
    fast.save_pretrained(tmp_path / "saved")
    again = llm.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", compute_dtype="fp32")
    assert torch.equal(again(**batch).logits, logits)
    assert bool(again.config.quantization_config.permuted_modules) == act_order
    same_experts(again, plain)
    assert torch.equal(again.dequantize()(**batch).logits, plain(**batch).logits)


@NAMES
def test_fp8_blocks(name: str, tmp_path: Path) -> None:
    """Here the quantized tensors have the very names that transformers would join."""
    plain, batch = copy.deepcopy(expert_model(name)), padded_batch()
    for number, experts in enumerate(experts_of(plain).values()):
        for parameter in experts.parameters():
            generator = torch.Generator().manual_seed(number)
            parameter.data = torch.randn(parameter.shape, generator=generator).to(torch.float8_e4m3fn).float() / 8
    plain.save_pretrained(tmp_path)

    def blocks(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".experts." in key]:
            tensors[key] = (tensors[key] * 8).to(torch.float8_e4m3fn)
            shape = [-(-size // 16) for size in tensors[key].shape]
            tensors[key.replace(".weight", ".weight_scale_inv")] = torch.full(shape, 0.125)

    edit_tensors(tmp_path, blocks)
    stored = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    edit_json(tmp_path / "config.json", lambda c: c.update(quantization_config=stored))
    fast = llm.AutoModelForCausalLM.from_pretrained(tmp_path, compute_dtype="fp32")
    same_experts(fast, plain)
    assert error(fast(**batch).logits, plain(**batch).logits, batch["attention_mask"]) < 2e-5


def test_symmetric_experts_among_others(tmp_path: Path) -> None:
    """A reader calls a linear symmetric when its zeros happen to be."""
    save_gptq_experts("mixtral", tmp_path)
    key = "model.layers.0.block_sparse_moe.experts.2.w2.qzeros"
    edit_tensors(tmp_path, lambda t: t.update({key: torch.full_like(t[key], 0x77777777)}))
    fast = llm.AutoModelForCausalLM.from_pretrained(tmp_path, compute_dtype="fp32")
    experts = fast.model.layers[0].mlp.experts
    assert [str(s.layout) for s in experts.schemes] == ["int4_asym_g16_f16"] * 2
    fast.save_pretrained(tmp_path / "saved")
    again = llm.from_quantized(tmp_path / "saved").model.layers[0].mlp.experts
    assert torch.equal(again.down, experts.down)


@pytest.mark.parametrize("inplace", [False, True])
def test_state_dict(inplace: bool, tmp_path: Path) -> None:
    plain, batch = save_gptq_experts("qwen2_moe", tmp_path), padded_batch()
    tensors = load_file(tmp_path / "model.safetensors")
    state = {key: value for key, value in tensors.items() if ".experts." in key}
    model = copy.deepcopy(expert_model("qwen2_moe"))
    before = model(**batch).logits
    fast = llm.optimize(model, low_precision_checkpoint=(state, GPTQ), inplace=inplace, deployment_mode=False)
    same_experts(fast, plain)
    assert inplace or torch.equal(model(**batch).logits, before)
    config = llm.WeightOnlyQuantConfig(modules_to_not_convert=["layers.1"], group_size=16)
    options = {"low_precision_checkpoint": (state, GPTQ), "quantization_config": config}
    fast = llm.optimize(expert_model("qwen2_moe"), **options)
    assert [isinstance(layer.mlp.experts, QuantExperts) for layer in fast.model.layers] == [True, False]


def test_a_refused_state_dict_leaves_the_model(tmp_path: Path) -> None:
    save_gptq_experts("qwen2_moe", tmp_path)
    state = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if ".experts." in k}
    model, batch = copy.deepcopy(expert_model("qwen2_moe")), padded_batch()
    before = model(**batch).logits
    for gone, message in (
        ("up_proj.", "and nothing for model.layers.1.mlp.experts.2.up_proj"),
        ("up_proj.scales", "no .*up_proj.scales"),
    ):
        part = {k: v for k, v in state.items() if not k.startswith(f"model.layers.1.mlp.experts.2.{gone}")}
        with pytest.raises(ValueError, match=message):
            llm.optimize(model, low_precision_checkpoint=(part, GPTQ), inplace=True)
        assert torch.equal(model(**batch).logits, before)


W1 = "model.layers.1.block_sparse_moe.experts.3.w1."


def one_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({k.replace("experts.3", "experts.4"): v.clone() for k, v in tensors.items() if k.startswith(W1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(W1 + "qweight"), "other experts quantized, and nothing for model.layers.1.mlp.experts.3.gate_proj"),
        (lambda t: t.pop(W1 + "scales"), "the checkpoint has no .*experts.3.w1.scales"),
        (lambda t: t.update({W1 + "scales": t[W1 + "scales"][:2]}), r"experts.3.w1.scales has shape \[2, 80\]"),
        (lambda t: t[W1 + "scales"].fill_(torch.nan), "experts.3.w1: scales has NaN"),
        (lambda t: t.update({W1 + "bias": torch.ones(80)}), "experts: 3.gate_proj has a bias, which experts cannot have"),
        (
            lambda t: t.update({W1 + "g_idx": t[W1 + "g_idx"][torch.arange(48) * 5 % 48].contiguous()}),
            "linears that take their input in different orders cannot be joined",
        ),
        (one_more, "experts.4.w1 are quantized in the checkpoint and no linear of"),
        (lambda t: t.update({"model.layers.1.mlp.experts.gate_up_proj": torch.ones(4, 160, 48)}), None),
    ],
    ids=["no codes", "no scales", "short", "nan", "bias", "order", "too many", "joined too"],
)  # fmt: skip
def test_damaged_experts_are_refused(change: Any, message: str | None, tmp_path: Path) -> None:
    save_gptq_experts("mixtral", tmp_path)
    edit_tensors(tmp_path, change)
    if message is None:  # float weights that nobody asks for, as in any checkpoint
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert llm.AutoModelForCausalLM.from_pretrained(tmp_path) is not None
        return
    with pytest.raises(ValueError, match=message):
        llm.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_experts_of_one_layer_in_different_formats(tmp_path: Path) -> None:
    save_gptq_experts("mixtral", tmp_path)
    prefix = W1.removesuffix(".")

    def eight_bits(tensors: dict[str, torch.Tensor]) -> None:
        for key in ("qweight", "qzeros"):
            tensors[f"{prefix}.{key}"] = torch.cat(
                [tensors[f"{prefix}.{key}"]] * 2, dim=int(key == "qzeros")
            ).contiguous()

    edit_tensors(tmp_path, eight_bits)
    stored = {**GPTQ, "dynamic": {"+:.*layers.1.block_sparse_moe.experts.3.w1": {"bits": 8}}}
    edit_json(tmp_path / "config.json", lambda c: c.update(quantization_config=stored))
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.experts: experts of one layer are stored in different formats"
    ):
        llm.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_experts_of_another_form_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_gptq_experts("mixtral", tmp_path)
    edit_json(tmp_path / "config.json", lambda c: c.update(hidden_act="relu"))
    with pytest.raises(ValueError, match="cannot be computed so: MixtralExperts: its activation is not one of"):
        llm.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("native", [False, True], ids=["gptq", "llmrt"])
def test_more_experts_than_tensors(native: bool, tmp_path: Path) -> None:
    """Each would be a module: the number is checked before they are made."""
    save_gptq_experts("mixtral", tmp_path)
    if native:
        llm.AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda c: c.update(num_local_experts=1 << 16))
    with pytest.raises(
        ValueError, match=r"config.json asks for 65536 experts in model.layers.0.mlp.experts; the checkpoint has"
    ):
        llm.AutoModelForCausalLM.from_pretrained(tmp_path)
