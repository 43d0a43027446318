"""Bytes and values at random in what surrounds the tensors: a correct load or a ValueError (an OSError where a file is missing)."""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model
from safetensors.torch import load_file, save_file
from test_static import calibrated, samples

from llmrt import llm
from llmrt.llm.checkpoints.files import TensorFiles, weight_files
from llmrt.llm.static.summary import read_qconf_summary

IDS = torch.arange(5)[None]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.sampled_from([1 << 31, 1 << 40, 1 << 63, -(1 << 63), 1e300, float("nan"), float("inf"), 0.5])
    | st.sampled_from(["", "int4", "int8", "nf4", "bf16", "fp32", "asym", "llmrt", "gptq", "lm_head", "..", "\0"])
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
CHANGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4)
FEW = settings(max_examples=25, derandomize=True, deadline=None)
MANY = settings(max_examples=60, derandomize=True, deadline=None)


def changed(content: bytes, changes: list[tuple[int, int]], cut: int = 0) -> bytes:
    result = bytearray(content)
    for position, byte in changes:
        result[position % len(result)] = byte
    return bytes(result[: len(result) - cut])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], torch.Tensor]:
    """A quantized directory, its configuration and its logits."""
    directory = tmp_path_factory.mktemp("fuzz") / "llmrt"
    config = llm.WeightOnlyQuantConfig(group_size=32, scheme="asym")
    model = llm.optimize(tiny_model("llama"), quantization_config=config)
    model.save_pretrained(directory)
    return directory, json.loads((directory / "config.json").read_text()), model(IDS).logits


def load(directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return llm.AutoModelForCausalLM.from_pretrained(directory, deployment_mode=False)


@FEW
@given(st.data())
def test_configurations(saved: tuple[Path, dict[str, Any], torch.Tensor], data: st.DataObject) -> None:
    """One value of config.json, of the model or of the quantization, is another one."""
    directory, config, logits = saved
    config = json.loads(json.dumps(config))
    part = data.draw(st.sampled_from([config, config["quantization_config"], config["quantization_config"]]))
    key = data.draw(st.sampled_from(sorted(part)))
    part[key] = data.draw(JSON)
    (directory / "config.json").write_text(json.dumps(config))
    try:
        model = load(directory)
    except (ValueError, OSError) as error:
        assert str(error)
        return
    found = model(IDS).logits
    assert found.shape == logits.shape
    if part is config["quantization_config"] and key != "compute_dtype":
        assert torch.equal(found, logits), "the weights are as they were stored, whatever is said of how they were made"


@FEW
@given(CHANGES, st.integers(0, 3))
def test_weights(saved: tuple[Path, dict[str, Any], torch.Tensor], changes: list[tuple[int, int]], cut: int) -> None:
    """Bytes of llmrt's own files: in the header, which is read, or in the tensors, whose scales must be finite."""
    directory, config, logits = saved
    (directory / "config.json").write_text(json.dumps(config))
    whole = (directory / "model.safetensors").read_bytes()
    start = int.from_bytes(whole[:8], "little")
    places = [(p % (start + 8) if i % 2 else p, b) for i, (p, b) in enumerate(changes)]
    try:
        (directory / "model.safetensors").write_bytes(changed(whole, places, 9 * max(0, cut - 2)))
        assert load(directory)(IDS).logits.shape == logits.shape
    except ValueError as error:
        assert str(error)
    finally:
        (directory / "model.safetensors").write_bytes(whole)


def with_field(content: bytes, name: str, field: str, value: Any) -> bytes:
    """Return a safetensors file in whose header one field of one tensor is another."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header[name][field] = value
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@MANY
@given(st.data())
def test_headers(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("headers") / "x.safetensors"
    tensors = {
        "a.b": torch.arange(6.0).view(2, 3),
        "c": torch.ones(1).to(torch.float8_e4m3fn),
        "d": torch.ones(0, 1 << 40),
    }
    save_file(tensors, path)
    content = path.read_bytes()
    if data.draw(st.booleans()):
        content = changed(content, data.draw(CHANGES), data.draw(st.sampled_from([0, 0, 1, 20])))
    else:
        sizes = st.lists(st.sampled_from([0, 1, 2, 3, 6, 12, 24, 25, 1 << 40, 1 << 63]), max_size=3)
        dtypes = st.sampled_from(["F32", "I32", "U32", "BF16", "F8_E4M3", "I64", "F4", "F6_E2M3", "C64", "BOOL"])
        fields = {"shape": sizes, "data_offsets": sizes, "dtype": dtypes}
        field = data.draw(st.sampled_from(sorted(fields)))
        content = with_field(
            content, data.draw(st.sampled_from(sorted(tensors))), field, data.draw(fields[field] | JSON)
        )
    path.write_bytes(content)
    try:
        files = TensorFiles([path])
        for name, entry in files.entries.items():
            tensor = files.read(name)
            assert (tuple(tensor.shape), tensor.dtype) == entry
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert files.nbytes <= path.stat().st_size


@MANY
@given(CHANGES, st.integers(0, 60), st.booleans())
def test_torch_files(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], cut: int, archive: bool
) -> None:
    stored = io.BytesIO()
    tensors = {"a.b": torch.arange(6.0).view(2, 3), "c": torch.ones(3).half()}
    torch.save(tensors, stored, _use_new_zipfile_serialization=archive)
    path = tmp_path_factory.mktemp("torch") / "x.bin"
    path.write_bytes(changed(stored.getvalue(), changes, max(0, cut - 30)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            files = TensorFiles([path])
        except ValueError as error:
            assert str(path) in str(error)
            return
    for name, entry in files.entries.items():
        assert tuple(files.read(name).shape) == entry.shape
    assert files.nbytes <= 4 * path.stat().st_size


@MANY
@given(st.data())
def test_indices(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("index")
    save_file({"a": torch.ones(1)}, directory / "x.safetensors")
    save_file({"b": torch.ones(1)}, directory / "y.safetensors")
    index: dict[str, Any] = {"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    place = data.draw(st.sampled_from(["weight_map", "a", "b", "bytes"]))
    names = JSON | st.sampled_from(["y.safetensors", "../x.safetensors", "x.bin", "/dev/zero", ".", "x.safetensors/"])
    if place != "bytes":
        (index if place == "weight_map" else index["weight_map"])[place] = data.draw(names)
    content = json.dumps(index).encode()
    if place == "bytes":
        content = changed(content, data.draw(CHANGES), data.draw(st.integers(0, 9)))
    (directory / "model.safetensors.index.json").write_bytes(content)
    try:
        found = weight_files(str(directory))
    except ValueError as error:
        assert str(directory) in str(error)
        return
    assert all(os.path.dirname(path) == str(directory) and os.path.isfile(path) for path in found)
    assert {"a", "b"} >= set(TensorFiles(found).entries)


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Any]:
    path, model = tmp_path_factory.mktemp("summary") / "q.json", tiny_model("llama")
    with torch.no_grad():
        calibrated(model, llm.StaticQuantConfig(), path, samples(1))
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return path, json.loads(path.read_text()), linears


@MANY
@given(st.data())
def test_summaries_of_static_quantization(summary: tuple[Path, dict[str, Any], Any], data: st.DataObject) -> None:
    path, content, linears = summary
    content = json.loads(json.dumps(content))
    part: Any = data.draw(st.sampled_from([content, *content["layers"]]))
    key = data.draw(st.sampled_from([*sorted(part), "factor"]))
    if key == "factor" and "factors" in part:
        part["factors"][data.draw(st.integers(0, len(part["factors"]) - 1))] = data.draw(JSON)
    else:
        part[key] = data.draw(JSON)
    text = json.dumps(content).encode()
    if data.draw(st.booleans()):
        text = changed(text, data.draw(CHANGES))
    path.write_bytes(text)
    try:
        found = read_qconf_summary(path, linears)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert found.keys() == linears.keys()
    for name, layer in found.items():
        assert layer.factors.shape == (linears[name].in_features,) and bool(layer.factors.isfinite().all())
        assert layer.input_scale > 0 and 0 <= layer.input_zero <= 255


@FEW
@given(st.data())
def test_stored_static_models(
    tmp_path_factory: pytest.TempPathFactory, static_model: Path, data: st.DataObject
) -> None:
    """One tensor is missing, of another shape or dtype, or has other values."""
    directory = Path(shutil.copytree(static_model, tmp_path_factory.mktemp("static") / "x"))
    tensors = load_file(directory / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(tensors)))
    found = tensors.pop(name)
    kind = data.draw(st.sampled_from(["missing", "rows", "dtype", "values", "name"]))
    if kind != "missing":
        tensors[name + "x" * (kind == "name")] = {
            "rows": found[: data.draw(st.integers(0, len(found) - 1))].clone() if found.dim() else found,
            "dtype": found.to(data.draw(st.sampled_from([torch.int8, torch.int64, torch.float16]))),
            "values": torch.full_like(found, data.draw(st.sampled_from([0, 1, 255, 77]))),
            "name": found,
        }[kind]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    try:
        model = load(directory)
    except ValueError as error:
        assert name.rpartition(".")[0] in str(error)
        return
    assert kind in ("values", "dtype") and model(IDS).logits.shape == (1, 5, 96)


@pytest.fixture(scope="module")
def static_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("static")
    config = llm.StaticQuantConfig()
    with torch.no_grad():
        calibrated(tiny_model("llama"), config, directory / "q.json", samples(1))
        model = llm.optimize(tiny_model("llama"), quantization_config=config, qconfig_summary_file=directory / "q.json")
        model.save_pretrained(directory / "m")
    return directory / "m"
