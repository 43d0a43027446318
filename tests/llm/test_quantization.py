"""WeightOnlyQuantConfig, QuantLinear and what shares a packed weight."""

from typing import Any

import pytest
import torch
from models import CountOperators, dequantized, error, padded_batch, tiny_model
from torch import nn

from llmrt import _C, llm
from llmrt.llm.linear import CanonicalLinear, LinearGroup, Scheme, SiblingLinear
from llmrt.ops.formats import Layout

G32 = Scheme(Layout("int4", False, 32, torch.bfloat16), "fp32")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "int4_sym_g128_bf16"),
        ({"weight_dtype": "int4_clip", "group_size": 32}, "int4_sym_g32_bf16"),
        ({"weight_dtype": "int4_fullrange"}, "int4_sym_g128_bf16 fullrange"),
        ({"alg": "asym", "scale_dtype": "fp32", "group_size": -1}, "int4_asym_channel_f32"),
        ({"load_in_8bit": True}, "int8_sym_g128_bf16"),
        ({"load_in_4bit": True, "weight_dtype": "int4_fullrange"}, "int4_sym_g128_bf16 fullrange"),
        ({"use_ggml": True}, "int4_sym_g32_f16 fullrange"),
        ({"use_ggml": True, "weight_dtype": "int8"}, "int8_sym_g32_f16"),
        ({"scale_dtype": "float16", "group_size": 50}, "int4_sym_g50_f16"),
        ({"weight_dtype": "nf4", "group_size": 64}, "nf4_sym_g64_bf16"),
        ({"weight_dtype": "fp4", "scale_dtype": "fp32"}, "fp4_e2m1_sym_g128_f32"),
        ({"weight_dtype": "nf4", "load_in_4bit": True}, "nf4_sym_g128_bf16"),
    ],
    ids=str,
)
def test_spellings(options: dict[str, Any], expected: str) -> None:
    config = llm.WeightOnlyQuantConfig(**options)
    assert str(config.layout()) + (" fullrange" if config.fullrange else "") == expected
    assert llm.WeightOnlyQuantConfig(**config.to_dict()) == config
    head = "int8_sym_channel_" + expected.split()[0].rpartition("_")[2]
    assert config.compute == "int8" and str(config.head_layout()) == head


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({"weight_dtype": "fp8"}, "fp8_e4m3_sym_g128_bf16"),
        ({"weight_dtype": "fp8_e5m2", "scale_dtype": "fp8", "group_size": 32}, "fp8_e5m2_sym_g32_e8m0"),
        ({"weight_dtype": "fp8", "load_in_8bit": True, "group_size": -1}, "fp8_e4m3_sym_channel_bf16"),
    ],
    ids=str,
)
def test_floats_of_8_bits_compute_as_floats(options: dict[str, Any], layout: str) -> None:
    config = llm.WeightOnlyQuantConfig(**options)
    assert str(config.layout()) == layout and str(config.head_layout()) == "int8_sym_channel_bf16"
    assert config.compute == ("bf16" if _C.cpu_isa() in ("avx512_bf16", "amx") else "fp32")
    assert config.compute_for(config.head_layout()) == "int8"
    assert llm.WeightOnlyQuantConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    "options",
    [
        {"weight_dtype": "fp8", "compute_dtype": "int8"},
        {"weight_dtype": "nf4", "scheme": "asym"},
        {"weight_dtype": "int4", "scale_dtype": "e8m0"},
    ],
    ids=str,
)
def test_a_combination_that_does_not_exist_lists_those_that_do(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"do not go together; those that exist:\n  int4: sym, asym; scales f32, bf16"):
        llm.WeightOnlyQuantConfig(**options)
    config = llm.WeightOnlyQuantConfig(compute_dtype="int8")
    with pytest.raises(
        ValueError, match="compute_dtype is 'int8' for weights of fp8_e4m3_sym_g128_f32; those that exist"
    ):
        config.compute_for(Layout.parse("fp8_e4m3_sym_g128_f32"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_dtype": "nf3"}, "weight_dtype is 'nf3'; valid: 'int4', 'int8', 'nf4', 'fp4_e2m1', 'fp8_e4m3'"),
        ({"weight_dtype": "nf4", "fullrange": True}, "fullrange is True for 'nf4'"),
        ({"compute_dtype": "int4"}, "compute_dtype is 'int4'; valid: 'auto', 'int8', 'bf16', 'fp16', 'fp32'"),
        ({"scale_dtype": "f64"}, "scale_dtype is 'f64'; valid: 'bf16', 'fp32', 'fp16', 'e8m0'"),
        ({"scheme": "symmetric"}, "scheme is 'symmetric'; valid: 'sym', 'asym'"),
        ({"group_size": 0}, "group_size is 0; valid: -1"),
        ({"group_size": 7}, "group_size is 7; valid: -1"),
        ({"group_size": "32"}, "group_size is '32'; valid: -1"),
        ({"method": "hqq"}, "method is 'hqq'; valid: 'rtn', 'gptq', 'awq', 'autoround'"),
        ({"lm_head": "nf4"}, "lm_head is 'nf4'; valid: True, False, 'int8', 'int4'"),
        ({"lm_head": 1}, "lm_head is 1; valid"),
        ({"use_gptq": True}, "GPTQ checkpoints cannot be read yet"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "both True"),
        ({"weight_dtype": "int4_fullrange", "alg": "asym"}, "fullrange"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; valid: 'llmrt'"),
    ],
    ids=str,
)
def test_values_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.WeightOnlyQuantConfig(**options)


@pytest.mark.parametrize(
    ("lm_head", "layout"),
    [(True, "int8_sym_channel_bf16"), ("int8", "int8_sym_channel_bf16"), ("int4", "int4_asym_g16_bf16")],
)
def test_head(lm_head: Any, layout: str) -> None:
    config = llm.WeightOnlyQuantConfig(group_size=16, scheme="asym", lm_head=lm_head)
    fast = llm.optimize(tiny_model("gemma"), quantization_config=config, strict=True)
    assert str(fast.lm_head.layout) == layout
    (entry,) = (e for e in fast.optimization_report.entries if e.kind == "head")
    assert "embedding that it was tied to stays floating point" in str(entry.by)
    assert not fast.config.tie_word_embeddings and tiny_model("gemma").config.tie_word_embeddings
    kept = llm.optimize(
        tiny_model("gemma"), quantization_config=llm.WeightOnlyQuantConfig(group_size=16, lm_head=False)
    )
    assert kept.lm_head.weight is kept.model.embed_tokens.weight and kept.config.tie_word_embeddings


def test_quant_linear() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(70, 37)
    fast = llm.QuantLinear.from_linear(linear, G32)
    x = torch.randn(2, 3, 70)
    expected = nn.functional.linear(x, fast.dequantized(), linear.bias)
    assert error(fast(x), expected) < 1e-5
    assert error(fast.dequantized(), linear.weight) < 0.1
    relu = llm.QuantLinear.from_linear(linear, G32, "relu")
    assert error(relu(x), expected.relu()) < 1e-5
    assert list(fast.state_dict()) == ["qweight", "scales", "bias"]
    other = llm.QuantLinear.from_linear(nn.Linear(70, 37), G32)
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(x), fast(x))
    assert "int4_sym_g32_bf16" in repr(fast) and "out_features=37" in repr(fast)
    stored = CanonicalLinear(70, 37, True, G32.layout, torch.float32)
    stored.load_state_dict(fast.state_dict())
    assert torch.equal(llm.QuantLinear.from_linear(stored, G32)(x), fast(x))
    with pytest.raises(RuntimeError, match=r"call llm\.optimize"):
        stored(x)


def test_siblings_share_one_product() -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(64, 40), nn.Linear(64, 24, bias=False), nn.Linear(64, 7)]
    group = LinearGroup.from_linears(linears, G32)
    q, k, v = (SiblingLinear(group, i) for i in range(3))
    alone = [llm.QuantLinear.from_linear(linear, G32) for linear in linears]
    x, y = torch.randn(5, 64), torch.randn(5, 64)
    expected = [module(x) for module in alone]

    def check(module: nn.Module, index: int, products: int, given: torch.Tensor = x) -> None:
        with CountOperators() as count:
            out = module(given)
        assert count["quant_linear"] == products
        assert error(out, alone[index](given)) < 1e-6

    check(q, 0, 1), check(k, 1, 0), check(v, 2, 0)
    assert group._pending == [None], "nothing is held when all were taken"
    check(v, 2, 1), check(q, 0, 0), check(q, 0, 1)  # any order; a second call computes again
    check(k, 1, 1, y), check(q, 0, 1), check(k, 1, 0), check(k, 1, 1, y)  # another input in between
    check(q, 0, 1), check(k, 1, 1, x.clone())  # equal numbers are not the same tensor
    z = x.clone()
    check(q, 0, 1, z)
    z.mul_(2)
    check(k, 1, 1, z)  # changed since
    assert torch.equal(expected[0], alone[0](x))
    with torch.inference_mode():
        w = torch.randn(2, 64)
        check(q, 0, 1, w), check(k, 1, 0, w), check(v, 2, 0, w)
    assert [error(m.dequantized(), a.dequantized()) for m, a in zip((q, k, v), alone, strict=True)] == [0, 0, 0]


def test_a_state_dict_has_the_original_names() -> None:
    config = llm.WeightOnlyQuantConfig(group_size=32, scheme="asym")
    for name in ("qwen2", "phi3", "gpt_neox"):
        plain = tiny_model(name)
        fast = llm.optimize(plain, quantization_config=config)
        state, tied = fast.state_dict(), set(plain.state_dict())
        linears = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear)]
        parts = {
            f"{n}.{part}" for n in linears for part in ("qweight", "scales", *(["zeros"] if n != "lm_head" else []))
        }
        assert set(state) == (tied - {f"{n}.weight" for n in linears}) | parts
        other = llm.optimize(plain, quantization_config=config)
        for buffer in other.buffers():
            if buffer.dtype == torch.uint8:
                buffer.zero_()
        other.load_state_dict(state)
        assert torch.equal(other(**padded_batch()).logits, fast(**padded_batch()).logits)
        with pytest.raises(RuntimeError, match=r"lm_head: the state dict has no lm_head\.scales"):
            other.load_state_dict({key: value for key, value in state.items() if key != "lm_head.scales"})
        state["lm_head.scales"] = state["lm_head.scales"] * torch.nan
        with pytest.raises(RuntimeError, match="scales has NaN or infinite values"):
            other.load_state_dict(state)


@pytest.mark.parametrize("compute", ["int8", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_compute_and_dtype(compute: str, dtype: torch.dtype) -> None:
    config = llm.WeightOnlyQuantConfig(weight_dtype="int8", group_size=16, compute_dtype=compute)
    fast, batch = llm.optimize(tiny_model("llama"), dtype=dtype, quantization_config=config), padded_batch()
    logits = fast(**batch).logits
    assert logits.dtype == dtype and fast.lm_head.compute == compute
    bits = {"int8": 4, "bf16": 5, "fp16": 9, "fp32": 12}[compute]  # that are right after rounding in every layer
    bits = min(bits, {torch.bfloat16: 4, torch.float16: 7, torch.float32: 12}[dtype])
    assert error(logits, dequantized("llama", fast)(**batch).logits, batch["attention_mask"]) < 2**-bits
