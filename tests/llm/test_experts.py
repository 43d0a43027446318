"""Mixture-of-experts models with quantized experts: what they compute, what they are made of, saved, compiled and exported."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import EXPERT_MODELS, dequantized_twin, expert_model, experts_of
from models import CountOperators, error, padded_batch
from safetensors.torch import load_file
from torch import nn

from llmrt import llm
from llmrt.llm.experts import QuantExperts
from llmrt.passes.backend import llmrt_backend

NAMES = pytest.mark.parametrize("name", EXPERT_MODELS)
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def quantized(name: str, **options: Any) -> Any:
    settings = {"group_size": 16, "compute_dtype": "fp32", **options}
    return llm.optimize(expert_model(name), quantization_config=llm.WeightOnlyQuantConfig(**settings), strict=True)


def kept(model: Any) -> set[str | None]:
    return {e.reason for e in model.optimization_report.entries if e.kind == "experts" and e.by is None}


@pytest.mark.exercises("int4")
@NAMES
def test_equal_to_the_dequantized_model(name: str) -> None:
    fast, batch = quantized(name), padded_batch()
    plain = dequantized_twin(name, fast)
    with CountOperators() as calls:
        logits = fast(**batch).logits
    assert calls["quant_experts"] == len(experts_of(plain)) and not experts_of(fast)
    assert error(logits, plain(**batch).logits, batch["attention_mask"]) < 2e-5
    assert torch.equal(fast.generate(**batch, **GREEDY), plain.generate(**batch, **GREEDY))
    assert fast.optimization_report.graphs and not any(
        "modules run" in line for line in fast.optimization_report.graphs
    )
    before, after = fast.optimization_report.bytes_before, fast.optimization_report.bytes_after
    assert after < 0.6 * before


@pytest.mark.parametrize("weight_dtype", ["int8", "nf4", "fp4", "fp8", "fp8_e5m2"])
def test_every_format(weight_dtype: str) -> None:
    fast, batch = quantized("mixtral", weight_dtype=weight_dtype), padded_batch()
    plain = dequantized_twin("mixtral", fast)
    assert error(fast(**batch).logits, plain(**batch).logits, batch["attention_mask"]) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    """One layer alone: in a whole model a rounding may choose another expert."""
    model = copy.deepcopy(expert_model("qwen3_moe")).to(dtype)
    config = llm.WeightOnlyQuantConfig(weight_dtype="int8", scheme="asym")
    fast = llm.optimize(model, quantization_config=config).model.layers[1].mlp
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert error(fast(x), model.model.layers[1].mlp(x)) < 0.03


def test_what_chooses_experts_stays_floating_point() -> None:
    fast = quantized("qwen2_moe")
    mlp = fast.model.layers[0].mlp
    assert isinstance(mlp.experts, QuantExperts) and isinstance(mlp.shared_expert_gate, nn.Linear)
    assert torch.equal(mlp.gate.weight, expert_model("qwen2_moe").model.layers[0].mlp.gate.weight)
    assert "it chooses or weighs experts" in str(fast.optimization_report)
    layouts = {"model.layers.0.mlp.shared_expert_gate": "int8_sym_channel_f32"}
    assert not isinstance(quantized("qwen2_moe", layouts=layouts).model.layers[0].mlp.shared_expert_gate, nn.Linear)


@pytest.mark.exercises("int8")
@NAMES
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    options = {"weight_dtype": "int8", "compute_dtype": "auto", "scheme": "asym"}
    fast, batch = quantized(name, **options), padded_batch()
    fast.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(llm.from_quantized(tmp_path)(**batch).logits, fast(**batch).logits)
    again = llm.AutoModelForCausalLM.from_pretrained(tmp_path, compute_dtype="fp32", strict=True)
    assert not experts_of(again) and not kept(again)
    plain = again.dequantize()
    assert type(plain) is type(expert_model(name)) and list(experts_of(plain)) == list(experts_of(expert_model(name)))
    assert error(plain(**batch).logits, dequantized_twin(name, fast)(**batch).logits, batch["attention_mask"]) < 1e-6


def test_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    fast, batch = quantized("qwen2_moe", compute_dtype="auto"), padded_batch()
    fast.save_pretrained(tmp_path)
    torch.save(batch, tmp_path / "batch.pt")
    code = (
        "import sys, torch\nfrom llmrt import llm\nd = sys.argv[1]\ntorch.set_num_threads(1)\n"
        "model = llm.from_quantized(d)\n"
        "torch.save(model(**torch.load(d + '/batch.pt')).logits, d + '/logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), fast(**batch).logits)


def test_state_dict_of_another_model_is_taken_over() -> None:
    fast, batch = quantized("mixtral"), padded_batch()
    other = llm.optimize(
        copy.deepcopy(expert_model("mixtral")).apply(lambda m: [p.mul_(0.5) for p in m.parameters(recurse=False)]),
        quantization_config=llm.WeightOnlyQuantConfig(group_size=16, compute_dtype="fp32"),
    )
    state = fast.state_dict()
    assert not torch.equal(other(**batch).logits, fast(**batch).logits)
    other.load_state_dict(state)
    assert torch.equal(other(**batch).logits, fast(**batch).logits)
    key = "model.layers.1.mlp.experts.2.up_proj.scales"
    with pytest.raises(RuntimeError, match=key):
        other.load_state_dict({k: v for k, v in state.items() if k != key})


@pytest.mark.parametrize("entry", ["experts", "layers.0", "*.mlp.experts.3.down_proj"])
def test_experts_are_kept(entry: str, tmp_path: Path) -> None:
    fast, batch = quantized("mixtral", modules_to_not_convert=[entry]), padded_batch()
    assert f"modules_to_not_convert has {entry!r}" in str(kept(fast))
    layers = [isinstance(layer.mlp.experts, QuantExperts) for layer in fast.model.layers]
    assert layers == [False, entry == "layers.0"]
    fast.save_pretrained(tmp_path)
    again = llm.from_quantized(tmp_path)
    assert torch.equal(again(**batch).logits, fast(**batch).logits)
    assert [isinstance(layer.mlp.experts, QuantExperts) for layer in again.model.layers] == layers


@pytest.mark.exercises("float32")
@NAMES
def test_without_quantization_they_stay(name: str) -> None:
    plain, batch = expert_model(name), padded_batch()
    model = llm.optimize(plain, deployment_mode=False, strict=True)
    assert list(experts_of(model)) == list(experts_of(plain))
    assert kept(model) == {"floating point: they run as transformers has them"}
    assert error(model(**batch).logits, plain(**batch).logits, batch["attention_mask"]) < 2e-5
    assert torch.equal(model.generate(**batch, **GREEDY), plain.generate(**batch, **GREEDY))


@pytest.mark.exercises("bfloat16")
@NAMES
def test_bfloat16_runs_as_graphs(name: str) -> None:
    plain, batch = copy.deepcopy(expert_model(name)).bfloat16(), padded_batch()
    model = llm.optimize(plain, strict=True)
    model.generate(**batch, max_new_tokens=2)
    assert not any("modules run" in line for line in model.optimization_report.graphs)
    layer, x = model.model.layers[1].mlp, torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert error(layer(x), plain.model.layers[1].mlp(x)) < 0.02


@pytest.mark.parametrize("original", [True, False], ids=["one tensor per expert", "joined"])
@NAMES
def test_directories_of_transformers(name: str, original: bool, tmp_path: Path) -> None:
    expert_model(name).save_pretrained(tmp_path, save_original_format=original)
    assert any("gate_up_proj" in key for key in load_file(tmp_path / "model.safetensors")) != original
    fast, batch = llm.AutoModelForCausalLM.from_pretrained(tmp_path, load_in_low_bit="nf4", strict=True), padded_batch()
    expected = llm.optimize(expert_model(name), quantization_config=llm.WeightOnlyQuantConfig(weight_dtype="nf4"))
    assert torch.equal(fast(**batch).logits, expected(**batch).logits)


def test_compiled_and_exported() -> None:
    name = "qwen2_moe"
    fast, batch = quantized(name), padded_batch()
    config = llm.WeightOnlyQuantConfig(group_size=16, compute_dtype="fp32")
    modules = llm.optimize(expert_model(name), quantization_config=config, deployment_mode=False)
    expected = fast(**batch).logits
    torch._dynamo.reset()
    run = torch.compile(modules, backend=llmrt_backend, fullgraph=True)
    assert error(run(**batch).logits, expected, batch["attention_mask"]) < 1e-5
    program = llm.export(modules)
    assert "quant_experts" in str(program.graph)
    keys, values = llm.CachedModel(modules).caches(batch=3, capacity=16)
    out = program.module()(batch["input_ids"], batch["attention_mask"], keys, values)
    assert error(out.view(3, -1), expected[:, -1]) < 1e-5


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrating_methods_round_experts_to_nearest(method: str) -> None:
    tokens = [torch.randint(3, 96, (16,), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    options = {"method": method, "calibration": tokens, "samples": 3, "sequence_length": 16, "weight_dtype": "int8"}
    fast, batch = quantized("qwen3_moe", **options), padded_batch()
    found = {e.name: e.reason for e in fast.optimization_report.entries if e.kind == "calibration" and e.name}
    assert found == {"model.layers.1.mlp.experts": "experts are rounded to nearest"}
    plain = dequantized_twin("qwen3_moe", fast)
    if method == "gptq":  # awq changes norms too
        assert error(fast(**batch).logits, plain(**batch).logits, batch["attention_mask"]) < 2e-5
    layer, inputs = fast.model.layers[1].mlp, torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(0))
    assert error(layer(inputs), plain.model.layers[1].mlp(inputs)) < 2e-5


@pytest.mark.parametrize(
    ("change", "last", "reason"),
    [
        (lambda m: setattr(m, "is_transposed", True), True, "MixtralExperts: its weights are stored transposed"),
        (lambda m: setattr(m, "act_fn", nn.ReLU().eval()), True, "its activation is not one of silu, gelu, gelu_tanh"),
        (lambda m: setattr(m, "_apply_gate", lambda x: x.chunk(2, -1)[0]), False, "does not compute the weighted sum"),
        (lambda m: m.register_parameter("bias", nn.Parameter(torch.ones(1))), True, "MixtralExperts has bias beside"),
        (lambda m: m.register_forward_hook(lambda *a: None), True, "the module has forward hooks"),
    ],
)
def test_experts_of_another_form_are_named(change: Any, last: bool, reason: str) -> None:
    model = copy.deepcopy(expert_model("mixtral"))
    for layer in model.model.layers[1:] if last else model.model.layers:
        change(layer.mlp.experts)
    config = llm.WeightOnlyQuantConfig()
    with pytest.raises(llm.OptimizationError, match=f"experts.*{reason}"):
        llm.optimize(model, quantization_config=config, strict=True)
    fast = llm.optimize(model, quantization_config=config)
    assert len(experts_of(fast)) == 2 - last and reason in str(kept(fast))


def test_weights_and_settings_that_cannot_be_quantized() -> None:
    model = copy.deepcopy(expert_model("mixtral"))
    layouts = {"model.layers.0.mlp.experts.1.up_proj": "int8_sym_channel_f32"}
    with pytest.raises(ValueError, match="layouts has different ones for the experts of model"):
        llm.optimize(model, quantization_config=llm.WeightOnlyQuantConfig(layouts=layouts))
    with pytest.raises(ValueError, match=r"modules_to_not_convert has 'experts\.4', which matches no linear"):
        llm.optimize(model, quantization_config=llm.WeightOnlyQuantConfig(modules_to_not_convert=["experts.4"]))
    model.model.layers[0].mlp.experts.down_proj.data[2, 5, 7] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.down_proj has NaN or infinite values"):
        llm.optimize(model, quantization_config=llm.WeightOnlyQuantConfig())
