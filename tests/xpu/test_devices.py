"""The loader of devices: what it says where one is missing, and moving an optimized model to one."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmrt import devices, llm, xpu

sys.path.insert(0, str(Path(__file__).parent.parent / "llm"))

from models import tiny_model


def pretend(monkeypatch: pytest.MonkeyPatch, available: bool, count: int = 1) -> None:
    """Make torch look like a build for Intel GPUs."""
    stand_in = SimpleNamespace(_is_compiled=lambda: True, is_available=lambda: available, device_count=lambda: count)
    monkeypatch.setattr(torch, "xpu", stand_in)


@pytest.mark.parametrize("device", ["tpu", "gpu", "meta", 3.5, None])
def test_what_is_no_device(device: object) -> None:
    with pytest.raises(ValueError, match="valid: 'cpu', 'xpu', 'cuda'"):
        devices.check(device)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.xpu._is_compiled(), reason="this torch is built for Intel GPUs")
def test_torch_without_the_device() -> None:
    with pytest.raises(RuntimeError, match=r"device is 'xpu:0', but this PyTorch .* is built without Intel GPUs"):
        devices.check("xpu:0")


def test_no_device_of_that_number(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, False)
    with pytest.raises(RuntimeError, match="device is 'xpu', but PyTorch sees no such device"):
        devices.check("xpu")
    pretend(monkeypatch, True, 2)
    with pytest.raises(RuntimeError, match="device is 'xpu:2'; this machine has 2 of them, counted from 0"):
        devices.check("xpu:2")
    assert devices.check("xpu:1") == torch.device("xpu", 1)


def test_neither_kind_of_kernel_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, True)
    monkeypatch.setattr(xpu.dispatch, "import_routes", lambda: None)
    monkeypatch.setattr(
        xpu.dispatch, "UNAVAILABLE", {"sycl": "no intel-sycl-rt", "triton": "the package triton is not installed"}
    )
    with pytest.raises(RuntimeError, match="kernels cannot run: sycl: no intel-sycl-rt; triton: the package triton"):
        devices.check("xpu")


def held_tensors(value: object, seen: set[int]) -> list[torch.Tensor]:
    """Return every tensor that an object holds, in modules, lists, dictionaries and plain attributes."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    parts: list[object] = []
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple | set):
        parts = list(value)
    elif isinstance(value, torch.nn.Module) or type(value).__module__.startswith("llmrt"):
        parts = list(getattr(value, "__dict__", {}).values())
    return [tensor for part in parts for tensor in held_tensors(part, seen)]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_optimize_moves_all_of_the_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU: no tensor stays behind, the given model stays as it was."""
    loaded = []
    monkeypatch.setattr(devices, "check", lambda device: torch.device("meta"))
    monkeypatch.setattr(devices, "load", loaded.append)
    model = tiny_model(family)
    config = llm.WeightOnlyQuantConfig(weight_dtype="int4", group_size=32)
    moved = llm.optimize(model, device="xpu", quantization_config=config)
    assert loaded == [torch.device("meta")]
    assert {t.device.type for t in held_tensors(moved, set())} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert "graphs, captured from the first calls" in str(moved.optimization_report)
