"""Every family of the table: equal to plain transformers, and run by the operators."""

import copy
from typing import Any

import pytest
import torch
from models import MODELS, CountOperators, dequantized, error, padded_batch, tiny_model

from llmrt import llm
from llmrt.llm.families import FAMILIES

GENERATE = {"max_new_tokens": 40, "do_sample": False}


def test_every_row_has_a_model() -> None:
    types = {tiny_model(name).config.model_type for name in MODELS}
    assert types == set(FAMILIES)


@pytest.mark.exercises("float32")
@pytest.mark.parametrize("name", MODELS)
def test_float32_equals_transformers(name: str) -> None:
    plain, batch = tiny_model(name), padded_batch()
    fast = llm.optimize(plain, strict=True)
    assert type(fast) is type(plain) and fast is not plain
    assert fast.optimization_report.family == plain.config.model_type
    assert error(fast(**batch).logits, plain(**batch).logits, batch["attention_mask"]) < 1e-4
    for beams in (1, 4):
        expected = plain.generate(**batch, **GENERATE, num_beams=beams)
        assert torch.equal(fast.generate(**batch, **GENERATE, num_beams=beams), expected)
        assert expected.shape[1] == batch["input_ids"].shape[1] + 40


@pytest.mark.parametrize("name", MODELS)
def test_float_model_calls_the_operators(name: str) -> None:
    tiny, fast = MODELS[name], llm.optimize(tiny_model(name), deployment_mode=False)
    norm = "rms_norm" if FAMILIES[fast.config.model_type].norm.startswith("rms") else "layer_norm"
    linears = sum(isinstance(m, torch.nn.Linear) for m in fast.modules())
    expected = {norm: tiny.norms, "attention": 2, "dense_linear": linears}
    expected |= {"rope": 2} if tiny.rope else {}
    expected |= {tiny.gated: 2} if tiny.gated else {}
    with CountOperators() as count:
        fast(**padded_batch())
    assert count.calls == expected
    with CountOperators() as count:
        fast.generate(**padded_batch(), max_new_tokens=3, do_sample=False)
    assert count.calls == {key: 3 * calls for key, calls in (expected | {"kv_append": 2}).items()}


@pytest.mark.exercises("bfloat16")
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_within_rounding_of_float32(name: str) -> None:
    plain, batch = tiny_model(name), padded_batch()
    real = batch["attention_mask"].bool()
    fast = llm.optimize(plain, dtype=torch.bfloat16)
    assert fast.dtype == fast.config.dtype == torch.bfloat16 and plain.dtype == torch.float32
    assert all(b.dtype == c.dtype for b, c in zip(fast.buffers(), plain.buffers(), strict=True))  # frequencies stay
    exact, slow = copy.deepcopy(plain), copy.deepcopy(plain)
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16().float()
    for parameter in slow.parameters():
        parameter.data = parameter.data.bfloat16()
    expected = exact(**batch).logits[real].double()

    def noise(model: Any) -> float:
        logits = model(**batch).logits
        assert logits.dtype == torch.bfloat16
        return float(((logits[real] - expected).square().mean() / expected.square().mean()).sqrt())

    # about 20 roundings to 8 bits in a row, the residual stream's among them; transformers' own bfloat16 rounds more often
    assert noise(fast) < min(5 * 2**-8, 1.2 * noise(slow))


@pytest.mark.parametrize("weight_dtype", [pytest.param(w, marks=pytest.mark.exercises(w)) for w in ("int4", "int8")])
@pytest.mark.parametrize("name", MODELS)
def test_quantized_equals_dequantized_weights(name: str, weight_dtype: str) -> None:
    plain, batch, mask = tiny_model(name), padded_batch(), padded_batch()["attention_mask"]
    config = llm.WeightOnlyQuantConfig(weight_dtype=weight_dtype, group_size=32, compute_dtype="fp32", scheme="asym")
    fast = llm.optimize(plain, quantization_config=config, strict=True)
    reference = dequantized(name, fast)
    expected = reference(**batch).logits
    assert error(fast(**batch).logits, expected, mask) < 1e-4
    assert torch.equal(fast.generate(**batch, **GENERATE), reference.generate(**batch, **GENERATE))
    smallest, largest = {"int4": (0.01, 1), "int8": (5e-4, 0.1)}[weight_dtype]  # few bits do change a tiny model
    assert smallest < error(expected, plain(**batch).logits, mask) < largest


@pytest.mark.parametrize("name", MODELS)
def test_quantized_model_calls_the_operators(name: str) -> None:
    tiny, batch = MODELS[name], padded_batch()
    config = llm.WeightOnlyQuantConfig(group_size=32)
    fast = llm.optimize(tiny_model(name), quantization_config=config, strict=True)
    with CountOperators() as count:
        logits = fast(**batch).logits
    assert count["quant_linear"] == 2 * tiny.linears + 1
    assert count["silu_mul"] == count["gelu_mul"] == 0
    assert count["attention"] == 2 and count["rope"] == (2 if tiny.rope else 0)
    # 8-bit activations: 1 / 254 of the largest of a group, through two layers
    assert error(logits, dequantized(name, fast)(**batch).logits, batch["attention_mask"]) < 0.1
