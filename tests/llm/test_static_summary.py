"""What calibration finds, how alpha is searched, and the summary file: edited by hand, and hostile."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import error, tiny_model
from test_static import Q, calibrated, edit, samples, static

from llmrt import llm
from llmrt.llm.static.observing import Observer
from llmrt.llm.static.smoothing import ALPHAS, Range, code_range, output_errors, smoothing_factors
from llmrt.ops import Layout


def entry(content: dict[str, Any], name: str = Q) -> dict[str, Any]:
    found = next(e for e in content["layers"] if e["name"] == name)
    assert isinstance(found, dict)
    return found


def test_the_file_holds_what_the_formulas_give(tmp_path: Path) -> None:
    model, seen, inputs = tiny_model("llama"), samples(), []
    hook = model.get_submodule(Q).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for sample in seen:
        model(**sample)
    hook.remove()
    calibrated(model, llm.StaticQuantConfig(alpha=0.7), tmp_path / "q.json", seen)
    found = entry(json.loads((tmp_path / "q.json").read_text()))
    x = torch.cat(inputs).flatten(0, -2)
    parts = [model.get_submodule(Q.replace("q_proj", f"{p}_proj")).weight for p in "qkv"]
    factors = torch.cat(parts).abs().amax(0) ** 0.3 / x.abs().amax(0) ** 0.7
    torch.testing.assert_close(torch.tensor(found["factors"]), factors, rtol=1e-5, atol=0)
    low, high = (x * factors).min().item(), (x * factors).max().item()
    assert found["input_scale"] == pytest.approx((high - low) / 255, rel=1e-5)
    assert found["input_zero"] == round(-low / found["input_scale"])
    assert (found["kind"], found["alpha"], found["weight_scale_dtype"]) == ("linear", 0.7, "fp32")
    content = json.loads((tmp_path / "q.json").read_text())
    assert content["version"] == 1 and entry(content, "lm_head")["kind"] == "head" and len(content["layers"]) == 15
    assert not list(tmp_path.glob("*.part"))


def test_edited_numbers_are_used(tmp_path: Path) -> None:
    model, config, seen = tiny_model("llama"), llm.StaticQuantConfig(), samples()
    calibrated(model, config, tmp_path / "q.json", seen)
    fast = [llm.optimize(model, quantization_config=config, qconfig_summary_file=tmp_path / "q.json")]
    edit(tmp_path / "q.json", lambda c: entry(c, "lm_head").update(input_scale=entry(c, "lm_head")["input_scale"] * 40))
    fast.append(llm.optimize(model, quantization_config=config, qconfig_summary_file=tmp_path / "q.json"))
    good, bad = (error(m(**seen[0]).logits, model(**seen[0]).logits) for m in fast)
    assert bad > 2 * good


def change_layer(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: entry(content).update(fields)


def change_factor(value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: entry(content)["factors"].__setitem__(3, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "version is 2; valid: 1"),
        (lambda c: c.pop("version"), "version is None; valid: 1"),
        (lambda c: c.update(format="other"), 'is not a summary: expected an object with "format"'),
        (lambda c: c.update(layers={}), r"layers is \{\}; expected a list"),
        (lambda c: c["layers"].append(3), "layer 15 is 3; expected an object"),
        (lambda c: c["layers"].pop(2), "layers has no model.layers.0.self_attn.v_proj: calibrate again"),
        (lambda c: c["layers"].append(c["layers"][0]), "q_proj' stands there twice"),
        (change_layer(name="model.layers.9.x"), "name is 'model.layers.9.x', which is no linear"),
        (change_layer(name=None), "name is None, which is no linear"),
        (lambda c: entry(c).pop("input_zero"), f"layer '{Q}' has no input_zero"),
        (change_layer(more=1), f"layer '{Q}' has 'more'; valid: name, kind"),
        (change_layer(kind="conv"), f"layer '{Q}': kind is 'conv'; valid: linear, head"),
        (change_layer(kind=["linear"]), f"layer '{Q}': kind is .*; valid: linear, head"),
        (change_layer(weight_scale_dtype="fp8"), "weight_scale_dtype is 'fp8'; valid: fp32, bf16, fp16"),
        (change_layer(alpha=1.5), f"layer '{Q}': alpha is 1.5; valid: 0 to 1"),
        (change_layer(input_zero=256), f"layer '{Q}': input_zero is 256; valid: 0 to 255"),
        (change_layer(input_zero=1.0), "input_zero is 1.0; valid: 0 to 255"),
        (change_layer(input_scale=-0.5), f"layer '{Q}': input_scale is -0.5; valid"),
        (change_layer(input_scale=math.nan), "input_scale is nan; valid"),
        (change_layer(input_scale=10**400), "input_scale is a number beyond 64 bits; valid"),
        (change_layer(input_scale=True), "input_scale is True; valid"),
        (change_layer(factors=[1.0] * 47), "factors has 47 numbers; expected 48"),
        (change_layer(factors="x" * 48), "factors is 'x.*; expected a list of 48 numbers"),
        (change_factor(math.nan), rf"layer '{Q}': factors\[3\] is nan; valid"),
        (change_factor(-1.0), r"factors\[3\] is -1.0; valid"),
        (change_factor(math.inf), r"factors\[3\] is inf; valid"),
        (change_factor(None), r"factors\[3\] is None; valid"),
    ],
)
def test_hostile_summaries(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    config = llm.StaticQuantConfig()
    calibrated(tiny_model("llama"), config, tmp_path / "q.json", samples(1))
    edit(tmp_path / "q.json", change)
    with pytest.raises(ValueError, match=message):
        llm.optimize(tiny_model("llama"), quantization_config=config, qconfig_summary_file=tmp_path / "q.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"3", "is not a summary"),
        (b" " * 3_000_000, "has 3000000 bytes; a summary of this model has at most"),
        (None, "No such file"),
    ],
)
def test_files_that_are_no_summary(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "q.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        llm.optimize(
            tiny_model("llama"), quantization_config=llm.StaticQuantConfig(), qconfig_summary_file=tmp_path / "q.json"
        )


def with_outliers() -> Any:
    """Return a model in which a few channels behind every norm are far larger than the others."""
    model = copy.deepcopy(tiny_model("llama"))
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[::11] *= 60
        for linear in (*list(layer.self_attn.children())[:3], layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight[:, ::11] /= 60
    return model


def test_alpha_search_is_not_worse_than_a_half(tmp_path: Path) -> None:
    model, seen, held_out = with_outliers(), samples(24), samples(28)[24:]
    models = {a: static(model, tmp_path, seen, alpha=a) for a in ("auto", 0.5, 0.0)}
    exact = torch.cat([model(**s).logits for s in held_out])
    errors = {a: (torch.cat([m(**s).logits for s in held_out]) - exact).square().mean() for a, m in models.items()}
    assert errors["auto"] <= 1.02 * errors[0.5] and errors["auto"] < 0.7 * errors[0.0], errors


def test_alpha_is_the_one_with_the_least_error(tmp_path: Path) -> None:
    torch.manual_seed(3)
    spread = torch.randn(40).mul(1.5).exp()
    x, weight = torch.randn(200, 40) * spread, torch.randn(24, 40)
    seen, layout = Range(x.amin(0), x.amax(0)), Layout("int8", False, -1, torch.float32)
    errors = output_errors(x, [weight[:10], weight[10:]], seen, layout, ALPHAS)
    for i in (0, 10, 16):
        factors = smoothing_factors(seen, weight.abs().amax(0), ALPHAS[i])
        scale, zero = code_range(seen, factors)
        codes = torch.round(x * factors / scale).clamp(-zero, 255 - zero) * scale
        step = (weight / factors).abs().amax(1, keepdim=True) / 127
        y = codes @ (torch.round(weight / factors / step) * step).T
        assert errors[i] == pytest.approx(float((y - x @ weight.T).square().sum()), rel=0.02)
    assert min(errors) < 0.2 * errors[0] and min(errors) < 0.8 * errors[20]


def test_channels_of_zeros_have_finite_factors() -> None:
    zero = Range(torch.zeros(8), torch.zeros(8))
    assert torch.equal(smoothing_factors(zero, torch.zeros(8), 0.5), torch.ones(8))
    assert code_range(zero, torch.ones(8)) == (1.0, 0)
    some = Range(torch.tensor([0.0, -4.0, 0.0]), torch.tensor([0.0, 2.0, 1.0]))
    factors = smoothing_factors(some, torch.tensor([1.0, 0.0, 2.0]), 0.5)
    assert factors.isfinite().all() and (factors > 0).all()


def test_kept_rows_are_few_and_drawn_from_all() -> None:
    observer = Observer(2, 50)
    rows = torch.arange(4000.0)[:, None].repeat(1, 2)
    for part in rows.split([3, 40, 100, 0, 2000, 1857]):
        observer.observe(part[None])
    assert observer.kept is not None and observer.kept.shape == (50, 2) and observer.seen == 4000
    assert observer.kept[:, 0].unique().numel() == 50 and 1500 < observer.kept[:, 0].mean() < 2500
    assert observer.range().low.tolist() == [0, 0] and observer.range().high.tolist() == [3999, 3999]


def test_rows_that_are_not_kept_have_a_range_of_their_own() -> None:
    observer, rows = Observer(3, 20), torch.randn(200, 3)
    for part in rows.split(37):
        observer.observe(part)
    assert observer.kept is not None
    others = torch.stack([row for row in rows if not (observer.kept == row).all(1).any()])
    assert len(others) == 180
    assert torch.equal(observer.held_out().low, others.amin(0))
    assert torch.equal(observer.held_out().high, others.amax(0))


def test_misuse_is_named(tmp_path: Path) -> None:
    config, model = llm.StaticQuantConfig(), tiny_model("llama")
    prepared = llm.optimize(model, quantization_config=config)
    with pytest.raises(ValueError, match="q_proj saw no input"):
        llm.save_qconf_summary(prepared, tmp_path / "q.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="the model is prepared for calibration: run samples"):
        llm.optimize(prepared, quantization_config=config)
    with pytest.raises(ValueError, match="not prepared for calibration"):
        llm.save_qconf_summary(model, tmp_path / "q.json")
    with pytest.raises(ValueError, match="qconfig_summary_file is for static INT8"):
        llm.optimize(model, qconfig_summary_file="q.json")
    with pytest.raises(ValueError, match="modules_to_not_convert has 'nothing', which matches no linear"):
        llm.optimize(model, quantization_config=llm.StaticQuantConfig(modules_to_not_convert=["nothing"]))
    prepared(**samples(1)[0])
    prepared.get_submodule(Q)(torch.full((1, 48), torch.nan))
    with pytest.raises(ValueError, match="q_proj saw NaN or infinite inputs"):
        llm.save_qconf_summary(prepared, tmp_path / "q.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha is 1.5; valid: 0.0 to 1.0 or 'auto'"),
        ({"alpha": "best"}, "alpha is 'best'; valid"),
        ({"alpha": True}, "alpha is True; valid"),
        ({"alpha": math.nan}, "alpha is nan; valid"),
        ({"scale_dtype": "fp8"}, "scale_dtype is 'fp8'; valid: 'fp32', 'bf16', 'fp16'"),
        ({"lm_head": "int4"}, "lm_head is 'int4'; valid: True, False"),
        ({"calibration_rows": 0}, "calibration_rows is 0; valid: 1 to"),
        ({"modules_to_not_convert": [3]}, r"modules_to_not_convert is \[3\]; valid: a list of names"),
        ({"scale_dtypes": {"a": "b"}}, "scale_dtypes is .*; valid: names of linears"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; valid: 'llmrt-static'"),
    ],
)
def test_configurations_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.StaticQuantConfig(**options)
