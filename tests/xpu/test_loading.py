"""Models that are loaded onto a device: every kind of directory, tensor by tensor, and what is said where the device is missing."""

import copy
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_devices import held_tensors
from typer.testing import CliRunner

from llmrt import devices, llm
from llmrt.llm import moving
from llmrt.llm.cli import app

sys.path.insert(0, str(Path(__file__).parent.parent / "llm"))

from expert_models import expert_model
from gptq_directories import edit_json, save_gptq
from models import padded_batch, tiny_model

load = llm.AutoModelForCausalLM.from_pretrained
INT4 = llm.WeightOnlyQuantConfig(weight_dtype="int4", group_size=32)
META = torch.device("meta")


def save_static(path: Path) -> None:
    config = llm.StaticQuantConfig()
    prepared = llm.optimize(tiny_model("llama"), quantization_config=config)
    with torch.no_grad():
        prepared(**padded_batch())
    llm.save_qconf_summary(prepared, str(path) + ".json")
    llm.optimize(
        tiny_model("llama"), quantization_config=config, qconfig_summary_file=str(path) + ".json"
    ).save_pretrained(path)


def save(kind: str, path: Path) -> None:
    if kind == "static":
        save_static(path)
    elif kind == "gptq":
        save_gptq(copy.deepcopy(tiny_model("llama")), path, act_order=True)
        stored = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}
        edit_json(path / "config.json", lambda config: config.update(quantization_config=stored))
    elif kind == "experts":
        llm.optimize(expert_model("mixtral"), quantization_config=INT4).save_pretrained(path)
    elif kind == "int4":
        llm.optimize(tiny_model("llama"), quantization_config=INT4).save_pretrained(path)
    else:
        tiny_model("llama").save_pretrained(path)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The meta device stands for a GPU; returns the devices whose kernels were asked for."""
    found: list[torch.device] = []
    monkeypatch.setattr(devices, "check", lambda d: META if torch.device(d).type == "xpu" else torch.device(d))
    monkeypatch.setattr(devices, "load", found.append)
    return found


@pytest.mark.parametrize("kind", ["float", "int4", "static", "gptq", "experts"])
def test_all_of_a_checkpoint_is_moved(kind: str, tmp_path: Path, loaded: list[torch.device]) -> None:
    save(kind, tmp_path / "saved")
    options = {"load_in_low_bit": "sym_int4"} if kind == "float" else {}
    model = load(tmp_path / "saved", device="xpu", **options)
    assert loaded == [META]
    assert {t.device for t in held_tensors(model, set())} == {META}
    assert model.config.quantization_config is not None
    assert "graphs, captured from the first calls" in str(model.optimization_report)
    if kind in ("int4", "static"):
        again = llm.from_quantized(tmp_path / "saved", device="xpu")
        assert {t.device for t in held_tensors(again, set())} == {META}


@pytest.mark.parametrize("named", ["xpu", {"": "xpu"}, torch.device("xpu")])
def test_a_device_map_of_one_device(named: Any, tmp_path: Path, loaded: list[torch.device]) -> None:
    save("int4", tmp_path)
    assert load(tmp_path, device_map=named).device == load(tmp_path, device_map=named, device="xpu").device == META


def test_one_tensor_is_on_the_host_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy stands for what arrives on the GPU: its values are the file's, and what it was made from is gone when the next one comes."""
    save("int4", tmp_path)
    expected = load(tmp_path)
    monkeypatch.setattr(devices, "check", torch.device)
    monkeypatch.setattr(devices, "load", lambda device: None)
    sources: list[weakref.ref[torch.Tensor]] = []

    def transferred(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert device == torch.device("xpu:1")
        assert not [1 for source in sources if source() is not None]
        sources.append(weakref.ref(tensor.untyped_storage()))
        return tensor.clone()

    monkeypatch.setattr(moving, "transferred", transferred)
    model = load(tmp_path, device="xpu:1")
    assert len(sources) == len({id(t) for t in (*expected.parameters(), *expected.buffers())})
    batch = {**padded_batch(), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**batch), expected.generate(**batch))


def test_tied_weights_stay_tied(loaded: list[torch.device]) -> None:
    model = copy.deepcopy(tiny_model("gemma"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    moved = llm.optimize(model, device="xpu")
    assert moved.lm_head.weight is moved.model.embed_tokens.weight and moved.lm_head.weight.is_meta


@pytest.mark.skipif(torch.xpu._is_compiled(), reason="this torch is built for Intel GPUs")
@pytest.mark.parametrize("options", [{"device": "xpu"}, {"device_map": "xpu"}, {"device_map": {"": "xpu"}}])
def test_a_missing_device_is_said_before_anything_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"device is 'xpu', but this PyTorch .* is built without Intel GPUs"):
        load(tmp_path / "nothing", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; valid: 'cpu', 'xpu', 'cuda'"),
        ({"device_map": "balanced"}, "device is 'balanced'; valid: 'cpu'"),
        ({"device": "cpu", "device_map": "xpu"}, "device is 'cpu' and device_map 'xpu'; a model runs on one device"),
        ({"device_map": {"model": "xpu:0", "lm_head": "xpu:1"}}, "a model runs on one device: pass device alone"),
    ],
)
def test_devices_that_cannot_be(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "nothing", **options)


@pytest.mark.parametrize("command", [("generate", "x = "), ("chat",), ("perplexity", "--demo-held-out")])
def test_commands_take_a_device(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches the loader; an absent one ends the command with a message."""
    asked = []
    monkeypatch.setattr(devices, "load", asked.append)
    result = CliRunner().invoke(app, [*command, "--device", "tpu"])
    assert result.exit_code == 2 and "--device: device is 'tpu'; valid: 'cpu', 'xpu', 'cuda'" in result.output
    monkeypatch.setattr(devices, "check", torch.device)
    monkeypatch.setattr(moving, "transferred", lambda tensor, device: tensor.clone())
    result = CliRunner().invoke(
        app, [*command, "--device", "xpu:1", *("--windows", "1") * (command[0] == "perplexity")], ""
    )
    assert result.exit_code == 0, result.output
    assert asked == [torch.device("xpu:1")]
