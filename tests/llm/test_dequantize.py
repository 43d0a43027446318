"""`model.dequantize()`: an optimized quantized model becomes a plain one again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, dequantized, error, padded_batch, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from llmrt import llm

MIXED = {
    "model.layers.0.self_attn.q_proj": "int8_asym_g16_f32",
    "model.layers.1.mlp.gate_proj": "int8_sym_channel_bf16",
}


@pytest.mark.parametrize("name", MODELS)
def test_plain_again(name: str, tmp_path: Path) -> None:
    fast = llm.optimize(tiny_model(name), quantization_config=llm.WeightOnlyQuantConfig(group_size=32))
    expected, batch = dequantized(name, fast), padded_batch()
    plain = fast.dequantize()
    assert plain is fast and type(plain) is type(tiny_model(name)) and not plain.training
    assert {type(m) for m in plain.modules()} == {type(m) for m in tiny_model(name).modules()}
    assert not {"forward", "generate", "optimization_report", "hf_quantizer"} & set(vars(plain))
    assert plain.config._attn_implementation != "llmrt" and not hasattr(plain.config, "quantization_config")
    assert error(plain(**batch).logits, expected(**batch).logits, batch["attention_mask"]) < 1e-6
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))
    assert torch.equal(again(**batch).logits, plain(**batch).logits)
    assert torch.equal(
        again.generate(**batch, max_new_tokens=4, do_sample=False),
        plain.generate(**batch, max_new_tokens=4, do_sample=False),
    )


def test_tied_heads_and_dtypes() -> None:
    for head in (True, False):
        config = llm.WeightOnlyQuantConfig(group_size=32, lm_head=head)
        fast = llm.optimize(tiny_model("gemma"), dtype=torch.bfloat16, quantization_config=config)
        plain = fast.dequantize()
        assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
        assert (plain.lm_head.weight is plain.get_input_embeddings().weight) == (not head)
        assert plain.config.tie_word_embeddings == (not head)
    assert llm.optimize(tiny_model("llama"), quantization_config=config).dequantize(torch.float16).lm_head.weight.dtype
    original = tiny_model("gemma")
    assert original.get_input_embeddings().weight.dtype == torch.float32 and original.config.tie_word_embeddings


def test_floating_models_have_nothing_to_dequantize() -> None:
    with pytest.raises(ValueError, match="first quantize"):
        llm.optimize(tiny_model("llama")).dequantize()


@pytest.mark.parametrize("kept", [None, ["k_proj", "layers.0.mlp"]])
def test_layouts_that_differ_by_linear(kept: Any, tmp_path: Path) -> None:
    options = {"group_size": 32, "layouts": MIXED, "modules_to_not_convert": kept}
    fast = llm.optimize(tiny_model("llama"), quantization_config=llm.WeightOnlyQuantConfig(**options))
    q = fast.model.layers[0].self_attn.q_proj
    assert isinstance(q, llm.QuantLinear) and str(q.layout) == MIXED["model.layers.0.self_attn.q_proj"]
    assert str(fast.model.layers[1].mlp.gate_proj.layout) == MIXED["model.layers.1.mlp.gate_proj"]
    assert fast.config.quantization_config.layouts == MIXED, "what the other fields do not say"
    fast.save_pretrained(tmp_path)
    again, batch = llm.from_quantized(tmp_path), padded_batch()
    assert torch.equal(again(**batch).logits, fast(**batch).logits)
    weights = [
        (a.weight if isinstance(a, nn.Linear) else a.dequantized()) for a in (fast.model.layers[0].mlp.down_proj,)
    ]
    assert torch.equal(again.dequantize().model.layers[0].mlp.down_proj.weight, weights[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layouts": {"model.layers.9.q": "int4_sym_g32_bf16"}}, "layouts has 'model.layers.9.q', which is no linear"),
        ({"layouts": {"lm_head": "int5_sym_g32_bf16"}}, r"layouts\['lm_head'\]: weight_dtype is 'int5'"),
        ({"layouts": {"lm_head": 4}}, r"layouts\['lm_head'\]"),
        ({"layouts": ["lm_head"]}, "layouts is .*; valid: a dict of names"),
        ({"permuted_modules": {"a": 1}}, "permuted_modules is .*; valid: a list of names"),
        ({"biased_modules": [3]}, r"biased_modules is \[3\]; valid"),
        ({"source": 3}, "source is 3; valid: a text or None"),
    ],
)
def test_configurations_that_name_linears(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.optimize(tiny_model("llama"), quantization_config=llm.WeightOnlyQuantConfig(**fields))
