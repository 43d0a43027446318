"""Static INT8: where the smoothing factors go, and that nothing else changes."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_models import small_model
from models import error, padded_batch, tiny_model
from test_static import Q, calibrated, edit, simulated, static
from torch import nn

from llmrt import llm
from llmrt.llm.static import plan
from llmrt.llm.static.folding import _norm_parameters
from llmrt.llm.static.linear import StaticGatedMLP

# Linears of a layer that are still multiplied: behind an activation, or heads of queries that share one of values.
MULTIPLIED = {
    "llama": {"self_attn.o_proj"},
    "gemma2": {"self_attn.o_proj"},
    "phi3": {"self_attn.o_proj"},
    "gpt_neox": {"mlp.dense_4h_to_h"},
    "opt": set(),  # what ReLU is given it gives in proportion
}


def multiplied(model: Any) -> set[str]:
    """Return the modules that multiply their input, without the layer's name."""
    names = [n for n, m in model.named_modules() if getattr(m, "factors", None) is not None and m is not model.lm_head]
    return {re.sub(r"^.*?\.\d+\.", "", n.removesuffix(".group")) for n in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MULTIPLIED)
def test_norms_and_linears_take_the_factors(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, batch = tiny_model(name), padded_batch()
    config = llm.StaticQuantConfig()
    calibrated(model, config, tmp_path / "q.json")
    fast = llm.optimize(model, dtype=dtype, quantization_config=config, qconfig_summary_file=tmp_path / "q.json")
    assert multiplied(fast) == MULTIPLIED[name]
    assert fast.lm_head.factors is not None  # a model's last hidden states are seen from outside
    bound = 0.02 if dtype == torch.float32 else 0.15
    assert (
        error(fast(**batch).logits, simulated(name, tmp_path / "q.json")(**batch).logits, batch["attention_mask"])
        < bound
    )
    kept = {e.name for e in fast.optimization_report.kept if e.kind == "smoothing"}
    assert len(kept) == 2 * len(MULTIPLIED[name]) + 1


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_dequantized_models_are_whole(name: str, tmp_path: Path) -> None:
    """Weights that stand for inputs which a norm multiplies, beside that norm."""
    fast, batch = static(tiny_model(name), tmp_path), padded_batch()
    plain, logits = fast.dequantize(), tiny_model(name)(**batch).logits
    assert 0 < error(plain(**batch).logits, logits, batch["attention_mask"]) < 0.1


@pytest.mark.parametrize(("name", "expected"), [("gptj", {"mlp.fc_out"}), ("falcon", set())])
def test_parallel_branches_have_common_factors(name: str, expected: set[str], tmp_path: Path) -> None:
    """One norm feeds attention and feed-forward part; linears of a class of their own stay floating point."""
    model, batch = small_model(name), padded_batch()
    fast = static(model, tmp_path, strict=False)
    assert multiplied(fast) == expected and not [e for e in fast.optimization_report.kept if "trial" in str(e.reason)]
    assert 0 < error(fast(**batch).logits, model(**batch).logits, batch["attention_mask"]) < 0.1


def test_linears_that_disagree_leave_the_norm_alone(tmp_path: Path) -> None:
    config, model, batch = llm.StaticQuantConfig(), tiny_model("llama"), padded_batch()
    calibrated(model, config, tmp_path / "q.json")

    def double(content: dict[str, Any]) -> None:
        q = next(layer for layer in content["layers"] if layer["name"] == Q)
        q.update(factors=[2 * f for f in q["factors"]], input_scale=2 * q["input_scale"])

    edit(tmp_path / "q.json", double)
    fast = llm.optimize(model, quantization_config=config, qconfig_summary_file=tmp_path / "q.json")
    first, second = fast.model.layers
    assert first.self_attn.q_proj.group.factors is None and second.self_attn.q_proj.factors is not None
    assert torch.equal(second.input_layernorm.weight, model.model.layers[1].input_layernorm.weight)
    assert not torch.equal(first.input_layernorm.weight, model.model.layers[0].input_layernorm.weight)
    assert isinstance(second.mlp, StaticGatedMLP) and second.mlp.factors is None
    assert error(fast(**batch).logits, simulated("llama", tmp_path / "q.json")(**batch).logits) < 0.02


def test_a_norm_with_a_hook_stays_as_it_is(tmp_path: Path) -> None:
    """Found in the first layer, it is not taken for granted in the second."""
    model, seen = copy.deepcopy(tiny_model("llama")), []
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda module, args, out: seen.append(out))
    fast, batch = static(model, tmp_path, strict=False), padded_batch()
    assert fast.model.layers[0].mlp.factors is None and fast.model.layers[1].mlp.factors is not None
    assert torch.equal(fast.model.layers[1].post_attention_layernorm.weight, norm.weight)
    assert error(fast(**batch).logits, model(**batch).logits, batch["attention_mask"]) < 0.1


def test_a_trial_that_fails_leaves_the_factors_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Any:
        raise RuntimeError("of the model's own")

    monkeypatch.setattr(plan, "find_folds", failing)
    fast, batch = static(tiny_model("opt"), tmp_path), padded_batch()
    assert "a trial run failed (RuntimeError: of the model's own)" in str(fast.optimization_report)
    assert error(fast(**batch).logits, simulated("opt", tmp_path / "q.json")(**batch).logits) < 0.02
    assert multiplied(fast) == {"self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"}


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_factors_are_those_of_the_norm_as_stored(offset: float) -> None:
    norm, factors = nn.LayerNorm(64).requires_grad_(False), torch.rand(64) * 3 + 0.1
    norm.weight.copy_(torch.randn(64))
    norm.weight[5], norm.bias[7] = -offset, 2.0
    found = _norm_parameters(norm, factors, offset, torch.bfloat16)
    if offset:  # numbers near -1 are too coarse in bfloat16
        assert found is None
        norm.weight.copy_(torch.rand(64))
        found = _norm_parameters(norm, factors, offset, torch.bfloat16)
    assert found is not None
    parameters, exact = found
    assert parameters["weight"].dtype == parameters["bias"].dtype == torch.bfloat16
    torch.testing.assert_close((norm.weight + offset) * exact, parameters["weight"].float() + offset)
    torch.testing.assert_close(exact, factors, rtol=0.01, atol=0)
    assert float(parameters["bias"][7]) == pytest.approx(2 * float(factors[7]), rel=0.01)
    assert _norm_parameters(norm, factors * 1e6, offset, torch.float16) is None
