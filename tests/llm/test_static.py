"""Static INT8: calibration, the summary file, the quantized model, saving and loading."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, CountOperators, error, padded_batch, tiny_model
from safetensors.torch import load_file, save_file

from llmrt import llm
from llmrt.llm.static.linear import StaticGroup, StaticLinear, StaticSibling
from llmrt.passes import llmrt_backend

Q = "model.layers.1.self_attn.q_proj"


def samples(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(3, 96, (4, 24), generator=generator)} for _ in range(count)]


def calibrated(model: Any, config: Any, path: Path, seen: list[dict[str, torch.Tensor]] | None = None) -> Any:
    """Write the summary of a model; return the prepared model."""
    prepared = llm.optimize(model, quantization_config=config)
    for sample in seen or [*samples(), padded_batch()]:
        prepared(**sample)
    llm.save_qconf_summary(prepared, path)
    return prepared


def static(model: Any, path: Path, seen: Any = None, strict: bool = True, **options: Any) -> Any:
    config = llm.StaticQuantConfig(**options)
    calibrated(model, config, path / "q.json", seen)
    return llm.optimize(model, quantization_config=config, qconfig_summary_file=path / "q.json", strict=strict)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def simulated(name: str, path: Path) -> Any:
    """Return the plain model with every linear's input and weight rounded as a summary says, in plain torch."""
    plain = copy.deepcopy(tiny_model(name))
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.clone(), False)  # apart from a tied embedding
    for layer in json.loads(path.read_text())["layers"]:
        factors, scale, zero = torch.tensor(layer["factors"]), layer["input_scale"], layer["input_zero"]
        linear = plain.get_submodule(layer["name"])
        weight = linear.weight / factors
        step = weight.abs().amax(1, keepdim=True) / 127
        linear.weight.data = (weight / step).round() * step * factors

        def rounded(_: Any, args: Any, factors: Any = factors, scale: float = scale, zero: int = zero) -> Any:
            v = torch.round(args[0] * factors / scale).clamp(-zero, 255 - zero)
            return (v * scale / factors,)

        linear.register_forward_pre_hook(rounded)
    return plain


@pytest.mark.parametrize("name", MODELS)
def test_flow(name: str, tmp_path: Path) -> None:
    model, batch = tiny_model(name), padded_batch()
    config = llm.StaticQuantConfig()
    before = copy.deepcopy(model.state_dict())
    prepared = calibrated(model, config, tmp_path / "q.json")
    assert torch.equal(prepared(**batch).logits, model(**batch).logits)
    fast = llm.optimize(model, quantization_config=config, qconfig_summary_file=tmp_path / "q.json", strict=True)
    with CountOperators() as count:
        logits = fast(**batch).logits
    assert count["static_linear"] == 2 * MODELS[name].linears + 1 and count["quant_linear"] == count["silu_mul"] == 0
    assert error(logits, simulated(name, tmp_path / "q.json")(**batch).logits, batch["attention_mask"]) < 0.02
    assert 0 < error(logits, model(**batch).logits, batch["attention_mask"]) < 0.1
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    linears = [e for e in fast.optimization_report.replaced if e.kind in ("linear", "head")]
    assert len(linears) == sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    assert all("StaticLinear" in str(e.by) for e in linears)
    again = llm.optimize(prepared, quantization_config=config, qconfig_summary_file=tmp_path / "q.json", inplace=True)
    assert again is prepared and torch.equal(again(**batch).logits, logits)


def test_generation_runs_graphs_of_static_linears(tmp_path: Path) -> None:
    fast, batch = static(tiny_model("llama"), tmp_path), padded_batch()
    slow = llm.optimize(
        tiny_model("llama"), quantization_config=llm.StaticQuantConfig(), qconfig_summary_file=tmp_path / "q.json",
        deployment_mode=False,
    )  # fmt: skip
    assert torch.equal(fast.generate(**batch, max_new_tokens=6), slow.generate(**batch, max_new_tokens=6))
    assert len(fast.optimization_report.graphs) == 2


def test_compiled_and_exported_models_are_equal(tmp_path: Path) -> None:
    fast, batch = static(tiny_model("llama"), tmp_path), samples(1)[0]
    expected = fast(**batch, use_cache=False).logits
    compiled = torch.compile(fast, backend=llmrt_backend, fullgraph=True)(**batch, use_cache=False).logits
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
    program = torch.export.export(fast, (), {**batch, "use_cache": False}, strict=False)
    torch.testing.assert_close(program.module()(**batch, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "opt"])
def test_reload_is_bit_equal(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kept = "layers.0.fc1" if name == "opt" else "layers.0.mlp"
    options = {"modules_to_not_convert": [kept], "lm_head": name != "qwen2", "scale_dtype": "bf16"}
    model, batch = tiny_model(name), padded_batch()
    config = llm.StaticQuantConfig(**options)  # type: ignore[arg-type]
    calibrated(model, config, tmp_path / "q.json")
    edit(tmp_path / "q.json", lambda c: c["layers"][0].update(weight_scale_dtype="fp32"))
    fast = llm.optimize(model, dtype=dtype, quantization_config=config, qconfig_summary_file=tmp_path / "q.json")
    fast.save_pretrained(tmp_path / "first")
    loaded = llm.from_quantized(tmp_path / "first")
    assert torch.equal(loaded(**batch).logits, fast(**batch).logits)
    assert {(e.name, e.by) for e in loaded.optimization_report.entries if e.kind == "linear"} == {
        (e.name, e.by) for e in fast.optimization_report.entries if e.kind == "linear"
    }
    loaded.save_pretrained(tmp_path / "second")
    files = [load_file(tmp_path / part / "model.safetensors") for part in ("first", "second")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    assert not [key for key in files[0] if "packed" in key or "group" in key or "sums" in key]
    saved = json.loads((tmp_path / "second/config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "llmrt-static"


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("input_scale", None, "has no .*q_proj.input_scale"),
        ("factors", lambda t: t.fill_(torch.nan), r"q_proj: factors has values outside of 1e-09 to 1e\+09"),
        ("factors", lambda t: t.neg_(), "q_proj: factors has values outside"),
        ("input_scale", lambda t: t.fill_(torch.inf), "q_proj: input_scale is inf; valid"),
        ("input_scale", lambda t: t.zero_(), "q_proj: input_scale is 0.0; valid"),
        ("input_zero", lambda t: t.int(), "q_proj.input_zero has dtype int32; expected uint8"),
        ("scales", lambda t: t.fill_(torch.nan), "q_proj.scales has NaN or infinite values"),
        ("factors", lambda t: t[:5], "mismatch|[Ss]hape|size"),
    ],
)
def test_hostile_tensors(suffix: str, change: Any, message: str, tmp_path: Path) -> None:
    static(tiny_model("llama"), tmp_path).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    found = tensors.pop(f"{Q}.{suffix}")
    if change is not None:
        tensors[f"{Q}.{suffix}"] = change(found).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=message):
        llm.from_quantized(tmp_path)


def test_state_dicts_of_static_models_load(tmp_path: Path) -> None:
    batch = padded_batch()
    first = static(tiny_model("llama"), tmp_path, alpha=0.3)
    second = static(tiny_model("llama"), tmp_path, alpha=0.8)

    def deployed(model: Any) -> torch.Tensor:
        return model(**batch, past_key_values=llm.KVCache(model.config), use_cache=True).logits

    deployed(second)  # its graph holds the old scales
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(**batch).logits, first(**batch).logits)
    assert torch.equal(deployed(second), deployed(first))
    assert len(second.optimization_report.graphs) == 1
    state = first.state_dict()
    state[f"{Q}.factors"] = state[f"{Q}.factors"] * 2
    with pytest.raises(RuntimeError, match="rounds its input otherwise than the linears that share its weight"):
        second.load_state_dict(state)


def test_siblings_share_a_weight_unless_their_inputs_are_rounded_differently(tmp_path: Path) -> None:
    fast = static(tiny_model("llama"), tmp_path)
    assert len([m for m in fast.modules() if isinstance(m, StaticGroup)]) == 2
    edit(tmp_path / "q.json", lambda c: next(e for e in c["layers"] if e["name"] == Q).update(input_zero=100))
    config = llm.StaticQuantConfig()
    apart = llm.optimize(tiny_model("llama"), quantization_config=config, qconfig_summary_file=tmp_path / "q.json")
    assert isinstance(apart.get_submodule(Q), StaticLinear) and apart.get_submodule(Q).input_zero == 100
    assert isinstance(apart.get_submodule(Q.replace("q_proj", "k_proj")), StaticSibling)
    assert not torch.equal(apart(**padded_batch()).logits, fast(**padded_batch()).logits)


def test_quantizing_while_loading_needs_a_calibration(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="static INT8 needs a calibration"):
        type(tiny_model("llama")).from_pretrained(tmp_path, quantization_config=llm.StaticQuantConfig())
