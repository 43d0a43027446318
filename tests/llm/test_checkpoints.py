"""Saving and loading llmrt's own format through transformers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, CountOperators, padded_batch, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmrt import llm

CONFIGS = {
    "int4": {"group_size": 32},
    "int4 asym": {"group_size": 20, "scheme": "asym", "scale_dtype": "fp32", "lm_head": "int4"},
    "int8, parts kept": {
        "weight_dtype": "int8",
        "lm_head": False,
        "modules_to_not_convert": ["k_proj", "layers.0.mlp"],
    },
}


def save(directory: Path, name: str = "llama", dtype: torch.dtype | None = None, **options: Any) -> Any:
    config = llm.WeightOnlyQuantConfig(**{"group_size": 32, **options})
    fast = llm.optimize(tiny_model(name), dtype=dtype, quantization_config=config)
    llm.save_quantized(fast, directory)
    return fast


@pytest.mark.parametrize("name", MODELS)
def test_reload_is_bit_equal(name: str, tmp_path: Path) -> None:
    fast, batch = save(tmp_path, name), padded_batch()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(fast) and loaded.optimization_report.family == fast.config.model_type
    with CountOperators() as count:
        logits = loaded(**batch).logits
    assert torch.equal(logits, fast(**batch).logits)
    assert count["quant_linear"] == 2 * MODELS[name].linears + 1 and count["attention"] == 2
    names = {(e.name, e.by) for e in loaded.optimization_report.replaced if e.kind != "head"}
    assert names == {(e.name, e.by) for e in fast.optimization_report.replaced if e.kind != "head"}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_configurations_survive(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    fast, batch = save(tmp_path / "first", dtype=dtype, **options), padded_batch()
    loaded = llm.from_quantized(tmp_path / "first")
    assert loaded.dtype == dtype
    assert torch.equal(loaded(**batch).logits, fast(**batch).logits)
    loaded.save_pretrained(tmp_path / "second")
    files = [load_file(tmp_path / part / "model.safetensors") for part in ("first", "second")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    saved = json.loads((tmp_path / "second/config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "llmrt"
    again = llm.from_quantized(tmp_path / "second")
    assert torch.equal(again.generate(**batch, max_new_tokens=5), fast.generate(**batch, max_new_tokens=5))


def test_saved_files_hold_canonical_tensors_only(tmp_path: Path) -> None:
    save(tmp_path, "qwen2")
    tensors = load_file(tmp_path / "model.safetensors")
    key = tensors["model.layers.0.self_attn.k_proj.qweight"]
    assert key.shape == (24, 24) and key.dtype == torch.uint8
    assert tensors["model.layers.0.self_attn.k_proj.bias"].shape == (24,)
    assert not [name for name in tensors if "packed" in name or "group" in name]
    with pytest.raises(ValueError, match="not quantized by llmrt"):
        llm.save_quantized(llm.optimize(tiny_model("llama")), tmp_path)


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"format": "pt"})


Q = "model.layers.1.self_attn.q_proj."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q + "qweight"), "the checkpoint has no model.layers.1.self_attn.q_proj.qweight"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.scales"), "has no model.layers.1.mlp.up_proj.scales"),
        (lambda t: t[Q + "scales"].fill_(torch.inf), "q_proj.scales has NaN or infinite values"),
        (lambda t: t["lm_head.scales"][5].fill_(torch.nan), "lm_head.*scales has NaN or infinite values"),
        (lambda t: t.update({Q + "qweight": t[Q + "qweight"].int()}), "q_proj.qweight has dtype int32; expected uint8"),
        (lambda t: t.update({Q + "qweight": t[Q + "qweight"][:, :4]}), "mismatch|[Ss]hape|size"),
        (lambda t: t.update({Q + "qweight": t[Q + "qweight"][:7]}), "mismatch|[Ss]hape|size"),
    ],
    ids=["no codes", "no scales", "infinite scale", "NaN scale", "dtype", "columns", "rows"],
)
def test_hostile_tensors(change: Callable[..., object], message: str, tmp_path: Path) -> None:
    save(tmp_path)
    edit_tensors(tmp_path, change)
    with pytest.raises((ValueError, RuntimeError), match=message):
        llm.from_quantized(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(weight_dtype="nf4"), "weight_dtype is 'nf4'; valid"),
        (lambda c: c.update(group_size=-5), "group_size is -5; valid"),
        (lambda c: c.update(group_size=1 << 62), "group_size is 4611686018427387904; valid"),
        (lambda c: c.update(group_size=64), "mismatch|[Ss]hape|size"),
        (lambda c: c.update(scheme="asym"), "has no model.layers.0.self_attn.[qkv]_proj.zeros"),
        (
            lambda c: c.update(floating_modules=["model.layers.9.mlp.up_proj"]),
            "names no linear of this model: model.layers.9",
        ),
        (lambda c: c.update(quant_method="gptq"), "is not an llmrt checkpoint"),
    ],
    ids=["dtype", "group size", "huge group size", "other group size", "no zeros", "module", "method"],
)
def test_hostile_configurations(change: Callable[..., object], message: str, tmp_path: Path) -> None:
    save(tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises((ValueError, RuntimeError), match=message):
        llm.from_quantized(tmp_path)


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        llm.from_quantized(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not an llmrt checkpoint"):
        llm.from_quantized(tmp_path)
    save(tmp_path / "q")
    with pytest.raises(ValueError, match="device_map has meta"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="meta")
    (tmp_path / "q/model.safetensors").write_bytes((tmp_path / "q/model.safetensors").read_bytes()[:-100])
    with pytest.raises(Exception, match=r"[Ii]ncomplete|[Ii]nvalid|[Hh]eader"):
        llm.from_quantized(tmp_path / "q")


def test_quantize_while_loading(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = llm.WeightOnlyQuantConfig(group_size=32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    fast = llm.optimize(tiny_model("llama"), quantization_config=config)
    assert torch.equal(loaded(**padded_batch()).logits, fast(**padded_batch()).logits)


def test_importing_llm_is_all_it_takes(tmp_path: Path) -> None:
    fast = save(tmp_path)
    torch.save(padded_batch(), tmp_path / "batch.pt")
    code = (
        "import sys, torch, llmrt.llm\nfrom transformers import AutoModelForCausalLM\n"
        "d = sys.argv[1]\nmodel = AutoModelForCausalLM.from_pretrained(d)\n"
        "torch.set_num_threads(1)\n"
        "torch.save(model(**torch.load(d + '/batch.pt')).logits, d + '/logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), fast(**padded_batch()).logits)
