"""GPTQ: exactly the algorithm, better than rounding to nearest, and nothing half done."""

from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import TOKENS, config, correlated, one_column_at_a_time
from models import MODELS, dequantized, error, padded_batch, tiny_model
from transformers import AutoModelForCausalLM

from llmrt import llm
from llmrt.llm.algorithms import gptq
from llmrt.llm.algorithms.gptq import inverse_factor, round_weight
from llmrt.llm.linear import Scheme, quantized
from llmrt.ops.formats import Layout, check_canonical, dequantize

CASES = [
    # weight dtype, asymmetric, group, scale, order, static, K, fullrange
    ("int4", False, 32, torch.bfloat16, False, False, 300, False),
    ("int4", True, 100, torch.float32, False, False, 300, False),
    ("int4", False, 200, torch.float16, False, False, 333, False),
    ("int4", False, -1, torch.float32, True, False, 150, False),
    ("int4", True, 48, torch.bfloat16, True, False, 200, False),
    ("int4", True, 48, torch.bfloat16, True, True, 200, False),
    ("int4", False, 32, torch.float32, True, True, 131, True),
    ("int8", False, 64, torch.bfloat16, True, True, 160, False),
    ("int8", True, -1, torch.float32, False, True, 129, False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)).replace("torch.", ""))
def test_equals_one_column_at_a_time(case: tuple[Any, ...]) -> None:
    name, asymmetric, group, scale, ordered, static, k, fullrange = case
    scheme = Scheme(Layout(name, asymmetric, group, scale), "fp32", fullrange)
    weight = torch.randn(17, k, dtype=torch.float64)
    weight[3] = 0.0
    x = correlated(2 * k, k)
    hessian = x.T @ x
    order = hessian.diagonal().argsort(descending=True) if ordered else torch.arange(k)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    expected = one_column_at_a_time(weight, damped, scheme, order.tolist(), static)

    factor = inverse_factor(hessian[order][:, order], 0.01)
    got = round_weight(weight, factor, scheme, order if ordered else None, static)
    assert torch.allclose(got.weight, expected, rtol=1e-12, atol=1e-12)
    check_canonical(*got.canonical, scheme.layout, k)
    stored = dequantize(*got.canonical, scheme.layout, k)
    assert (got.perm is not None) == (ordered and not static)
    if got.perm is not None:  # y = x[..., perm] @ W.T
        assert torch.equal(got.perm.long(), order)
        stored = torch.empty_like(stored).index_copy_(1, got.perm.long(), stored)
    assert torch.equal(stored, expected.float())


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_outputs_are_better_than_of_rounding_to_nearest(ordered: bool, asymmetric: bool) -> None:
    scheme = Scheme(Layout("int4", asymmetric, 32, torch.bfloat16), "fp32")
    weight, x = torch.randn(40, 128), correlated(512, 128).float()
    hessian = x.T @ x
    order = hessian.diagonal().argsort(descending=True) if ordered else torch.arange(128)
    factor = inverse_factor(hessian[order][:, order], 0.01)
    got = round_weight(weight, factor, scheme, order if ordered else None, static_groups=ordered).weight
    near = dequantize(*quantized(weight, scheme), scheme.layout, 128)
    new = correlated(512, 128, seed=0).float()[::2] + 0.1 * torch.randn(256, 128)
    assert (new @ (got - weight).T).square().sum() < 0.6 * (new @ (near - weight).T).square().sum()


def test_uncorrelated_inputs_give_rounding_to_nearest() -> None:
    scheme = Scheme(Layout("int4", True, 32, torch.float32), "fp32")
    weight = torch.randn(9, 96)
    got = round_weight(weight, inverse_factor(torch.eye(96), 0.01), scheme)
    for mine, theirs in zip(got.canonical, quantized(weight, scheme), strict=True):
        assert torch.equal(mine, theirs)


def test_the_factor_is_of_the_inverse() -> None:
    x = correlated(200, 40)
    hessian = x.T @ x
    factor = inverse_factor(hessian, 0.0)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor @ hessian, torch.eye(40, dtype=torch.float64), atol=1e-6)


def test_damping_is_raised_until_the_factorization_exists() -> None:
    x = correlated(3, 64)  # rank 3
    indefinite = x.T @ x
    indefinite.diagonal().sub_(1e-4 * indefinite.diagonal().mean())
    factor = inverse_factor(indefinite, 0.0)
    assert bool(torch.isfinite(factor).all()) and bool((factor.diagonal() > 0).all())
    with pytest.raises(ValueError, match="cannot be factored"):
        inverse_factor(-torch.ones(4, 4) + 2 * torch.eye(4) - 100 * torch.diag(torch.ones(3), 1), 0.01)
    with pytest.raises(ValueError, match="NaN or infinite"):
        inverse_factor(torch.full((4, 4), torch.nan), 0.01)


def test_an_input_that_is_always_zero_is_rounded_to_nearest_and_moves_nothing() -> None:
    scheme = Scheme(Layout("int4", False, 16, torch.float32), "fp32")
    x = correlated(100, 32)
    x[:, 5] = 0
    weight = torch.randn(6, 32)
    got = round_weight(weight, inverse_factor(x.T @ x, 0.01), scheme, static_groups=True).weight
    near = dequantize(*quantized(weight, scheme), scheme.layout, 32)
    assert torch.equal(got[:, 5], near[:, 5]) and not torch.equal(got, near)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_calibrated_and_the_given_model_stays(name: str) -> None:
    plain, batch = tiny_model(name), padded_batch()
    before = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    fast = llm.optimize(plain, quantization_config=config("gptq", lm_head="int4"), strict=True)
    assert all(torch.equal(before[key], tensor) for key, tensor in plain.state_dict().items())
    (entry,) = (e for e in fast.optimization_report.entries if e.kind == "calibration")
    assert entry.by == "gptq, 6 samples of 24 tokens from the given token ids"
    near = llm.optimize(plain, quantization_config=config("rtn", lm_head="int4"))
    ids, exact = torch.stack(TOKENS), plain(torch.stack(TOKENS)).logits
    errors = [(m(ids).logits - exact).square().mean() for m in (fast, near)]
    assert errors[0] < 0.8 * errors[1]
    assert error(fast(**batch).logits, dequantized(name, fast)(**batch).logits, batch["attention_mask"]) < 1e-4


def test_layers_see_the_quantized_ones_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second moments of the last linear are those of the quantized model up to there."""
    seen: list[torch.Tensor] = []
    moments = gptq._moments
    monkeypatch.setattr(gptq, "_moments", lambda *a: seen.append(moments(*a)) or seen[-1])
    fast = llm.optimize(tiny_model("llama"), quantization_config=config("gptq"))
    plain, inputs = dequantized("llama", fast), []
    plain.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0].flatten(0, 1)))
    for tokens in TOKENS:
        plain(tokens[None])
    x = torch.cat(inputs)
    assert error(seen[-1], x.T @ x) < 1e-4


def test_save_and_reload_is_bit_equal(tmp_path: Path) -> None:
    fast = llm.optimize(tiny_model("qwen2"), quantization_config=config("gptq", scheme="asym", act_order=False))
    llm.save_quantized(fast, tmp_path)
    loaded, batch = AutoModelForCausalLM.from_pretrained(tmp_path), padded_batch()
    assert torch.equal(loaded(**batch).logits, fast(**batch).logits)
    saved = loaded.config.quantization_config
    assert (saved.method, saved.act_order, saved.calibration) == ("gptq", False, None)


@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
def test_groups_in_the_order_of_rounding_permute_the_inputs(name: str, tmp_path: Path) -> None:
    settings = config("gptq", static_groups=False, lm_head="int4")
    fast, batch = llm.optimize(tiny_model(name), quantization_config=settings, strict=True), padded_batch()
    assert error(fast(**batch).logits, dequantized(name, fast)(**batch).logits, batch["attention_mask"]) < 1e-4
    llm.save_quantized(fast, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, fast(**batch).logits)
    assert len(loaded.config.quantization_config.permuted_modules) > 6


@pytest.mark.parametrize("inplace", [False, True])
def test_an_interruption_leaves_the_model_as_it_was(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import copy

    plain, batch = copy.deepcopy(tiny_model("llama")), padded_batch()
    expected, calls = plain(**batch).logits, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return round_weight(*args)

    monkeypatch.setattr(gptq, "round_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.optimize(plain, quantization_config=config("gptq"), inplace=inplace)
    assert len(calls) == 9 and torch.equal(plain(**batch).logits, expected)
    assert not hasattr(plain, "optimization_report")
