"""What surrounds the tensors: configurations, indices and torch files of strangers."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_directories import edit_json
from models import tiny_model
from safetensors.torch import load_file, save_file

from llmrt import llm
from llmrt.llm.checkpoints.files import TensorFiles, weight_files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a plain and a quantized one in it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("llama").save_pretrained(folder / "plain")
    config = llm.WeightOnlyQuantConfig(group_size=32)
    llm.optimize(tiny_model("llama"), quantization_config=config).save_pretrained(folder / "llmrt")
    return folder


def copied(saved: Path, kind: str, to: Path) -> Path:
    return Path(shutil.copytree(saved / kind, to / kind))


def load(directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return llm.AutoModelForCausalLM.from_pretrained(directory)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "text for a number": ({"hidden_size": "48"}, "config.json cannot be used: .*hidden_size"),
    "negative": ({"hidden_size": -48}, "no model can be made of its config.json: .*negative dimension"),
    "none at all": ({"hidden_size": 0}, "has 0 inputs|size 0|embed_tokens.weight has shape|has shape"),
    "terabytes": ({"vocab_size": 1 << 40}, r"config.json asks for \d+ values of parameters; the checkpoint's weights have"),
    "beyond 64 bits": ({"vocab_size": 1 << 70}, "no model can be made of its config.json"),
    "one more": ({"vocab_size": 97}, r"has shape \[96, 48\]; expected \[97, 48\]|scales has shape"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0; valid: at least 1"),
    "layers that are not there": ({"num_hidden_layers": 3}, r"has no model.layers.2.* and \d+ more tensors"),
    "many layers": ({"num_hidden_layers": 10**8}, r"num_hidden_layers is 100000000, but the files have \d+ tensors"),
    "no heads": ({"num_attention_heads": 0}, "config.json cannot be used: ZeroDivisionError"),
    "an activation of no model": ({"hidden_act": "os.system"}, "no model can be made of its config.json: KeyError: 'os.system'"),
    "a dtype of no torch": ({"dtype": "float99"}, "config.json cannot be used: .*float99"),
    "a module for a dtype": ({"dtype": "nn"}, "config.json cannot be used"),
    "nested values": ({"rope_parameters": nested(900)}, "config.json cannot be used: RecursionError"),
    "text for quantization": ({"quantization_config": "gptq"}, "config.json cannot be used|quantization_config is 'gptq'"),
    "nested quantization": ({"quantization_config": {"dynamic": nested(900)}}, "cannot be used: RecursionError"),
    "no method": ({"quantization_config": {"bits": 4}}, "quantization_config is of a format that cannot be read: {'bits': 4}"),
    "methods": ({"quantization_config": {"quant_method": ["llmrt"]}}, "cannot be read: {'quant_method': "),
    "the frame's own method": ({"quantization_config": {"quant_method": "llmrt-import"}}, "cannot be read: .*'llmrt-import'"),
    "a file elsewhere": ({"transformers_weights": "../plain/model.safetensors"}, "transformers_weights is '../plain.*; valid: a file of"),
    "no file": ({"transformers_weights": 3}, "transformers_weights is 3; valid: a file of the directory|cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "llmrt"])
@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations(case: str, kind: str, saved: Path, tmp_path: Path) -> None:
    changes, message = CONFIGURATIONS[case]
    directory = copied(saved, kind, tmp_path)
    edit_json(directory / "config.json", lambda c: c.update(changes))
    with pytest.raises(ValueError, match=message):
        load(directory)


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "list": ({"weight_dtype": ["int4"]}, r"weight_dtype is \['int4'\]; those that exist"),
    "dict": ({"scale_dtype": {}}, r"scale_dtype is \{\}; those that exist"),
    "of a later version": ({"sparsity": 2}, "this version of llmrt does not know 'sparsity'; valid: .*weight_dtype"),
    "other dtype": ({"scale_dtype": "fp32"}, "scales has dtype bfloat16; expected float32"),
    "half": ({"group_size": 32.5}, "group_size is 32.5; valid"),
    "truth": ({"group_size": True}, "group_size is True; valid"),
    "layout": ({"layouts": {"lm_head": ["int4"]}}, r"layouts\['lm_head'\]"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields_of_the_quantization(case: str, saved: Path, tmp_path: Path) -> None:
    changes, message = FIELDS[case]
    directory = copied(saved, "llmrt", tmp_path)
    edit_json(directory / "config.json", lambda c: c["quantization_config"].update(changes))
    for read in (load, llm.from_quantized):
        with pytest.raises(ValueError, match=message):
            read(directory)


def test_fewer_layers_than_the_file_has(saved: Path, tmp_path: Path) -> None:
    directory = copied(saved, "llmrt", tmp_path)
    edit_json(directory / "config.json", lambda c: c.update(num_hidden_layers=1))
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.down_proj and 6 more are quantized in the checkpoint and no linear"
    ):
        load(directory)


def test_one_tensor_under_two_names(saved: Path, tmp_path: Path) -> None:
    directory = copied(saved, "llmrt", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    for name in ("norm.weight", "layers.0.self_attn.q_proj.qweight"):
        other = tensors[f"model.{name}"] + 1
        save_file({**tensors, name: other}, directory / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=rf"(model.)?{name} and (model.)?{name} are both the model's model.{name}"):
            load(directory)


def shard(directory: Path, index: str, file: str) -> None:
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    names = load_file(directory / "a.safetensors")
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "other.safetensors.index.json"])
def test_an_index_that_leads_elsewhere(index: str, saved: Path, tmp_path: Path) -> None:
    """Also one that the configuration names instead of the usual one."""
    directory = copied(saved, "plain", tmp_path)
    shutil.copy(directory / "model.safetensors", tmp_path / "secret.safetensors")
    shard(directory, index, "../secret.safetensors")
    if index.startswith("other"):
        edit_json(directory / "config.json", lambda c: c.update(transformers_weights=index))
    with pytest.raises(
        ValueError, match=r"names the file '../secret.safetensors'; valid: files of the directory itself"
    ):
        load(directory)
    for name in ("/etc/passwd", "..", "", "a\0b", str(tmp_path / "secret.safetensors")):
        (directory / index).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match=r"valid: files of the directory itself"):
            load(directory)


def test_an_index_in_a_folder_and_of_a_variant(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "plain", tmp_path / "in" / "sub")
    directory = tmp_path / "in" / "sub"
    shard(directory, "model.safetensors.index.fp16.json", "b.safetensors")
    for path, options in ((tmp_path / "in", {"subfolder": "sub"}), (directory, {})):
        with pytest.raises(ValueError, match=r"names b.safetensors, which is not there"):
            llm.AutoModelForCausalLM.from_pretrained(path, variant="fp16", **options)
    (directory / "model.safetensors.index.fp16.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match=r"weight_map does not map names"):
        weight_files(str(directory), variant="fp16")


def test_a_stale_index_beside_whole_files(saved: Path, tmp_path: Path) -> None:
    directory = copied(saved, "plain", tmp_path)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (directory / name).write_text("{")
    assert weight_files(str(directory)) == [str(directory / "model.safetensors")]
    assert weight_files(str(directory), safetensors=False) == [str(directory / "pytorch_model.bin")]
    assert load(directory) is not None


@pytest.mark.parametrize("content", ["{", "[1]", '{"bits": 4, "bits": 8}', "[" * 100_000, "\ud800"])
def test_a_file_of_settings_beside_an_old_configuration(content: str, saved: Path, tmp_path: Path) -> None:
    directory = copied(saved, "plain", tmp_path)
    (directory / "quantize_config.json").write_text(content, errors="surrogatepass")
    with pytest.raises(ValueError, match=r"quantize_config.json (is no usable JSON|holds a list; expected an object)"):
        load(directory)


def archive(tensors: dict[str, Any], change: Callable[[bytes], bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """Return a torch file with its pickle changed, written again."""
    stored, result = io.BytesIO(), io.BytesIO()
    torch.save(tensors, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(result, "w", method) as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return result.getvalue()


def legacy(tensors: dict[str, Any], change: Callable[[bytes], bytes]) -> bytes:
    stored = io.BytesIO()
    torch.save(tensors, stored, _use_new_zipfile_serialization=False)
    return change(stored.getvalue())


def larger(content: bytes) -> bytes:
    """A tensor of 7 values says that it has 2^24."""
    assert b"K\x07\x85" in content
    return content.replace(b"K\x07\x85", b"J\x00\x00\x00\x01\x85", 1)


SEVEN = {"w": torch.arange(7.0)}
TORCH_FILES = {
    "compressed": (lambda: archive(SEVEN, bytes, zipfile.ZIP_DEFLATED), "is compressed; torch.save stores tensors as they are"),
    "a size": (lambda: archive(SEVEN, larger), "is no file of tensors"),
    "a size, before archives": (lambda: legacy(SEVEN, larger), "is no file of tensors .*wrong byte size"),
    "views": (lambda: archive({"w": torch.zeros(1).expand(1 << 20, 1 << 20)}, bytes), r"but tensors of 4398046511104 bytes"),
    "no values": (lambda: archive({"w": torch.empty(3, device="meta")}, bytes), "w is on the meta device; expected a dense"),
    "an archive of nothing": (lambda: b"PK\x03\x04" + bytes(99), "is no file of tensors .*not a zip file"),
    "a pickle of a list": (lambda: pickle.dumps([1]), "is no file of tensors|holds a list"),
    "nothing": (lambda: b"", "is no file of tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", TORCH_FILES)
def test_torch_files(case: str, tmp_path: Path) -> None:
    make, message = TORCH_FILES[case]
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(make())
    with pytest.raises(ValueError, match=message) as caught:
        TensorFiles([path])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("write", [archive, legacy])
def test_tied_and_transposed_tensors_of_torch_files(write: Any, tmp_path: Path) -> None:
    table = torch.randn(5, 3)
    path = tmp_path / "x.bin"
    path.write_bytes(write({"a": table, "b": table, "c": table.t()}, bytes))
    files = TensorFiles([path])
    assert torch.equal(files.read("b"), table) and torch.equal(files.read("c"), table.t()) and files.nbytes == 180


def test_a_compressed_torch_file_of_floats(saved: Path, tmp_path: Path) -> None:
    """torch would map the compressed bytes as if they were the numbers."""
    directory = copied(saved, "plain", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(archive(tensors, bytes, zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match=r"pytorch_model.bin is compressed"):
        load(directory)
    (directory / "pytorch_model.bin").write_bytes(archive(tensors, bytes))
    assert load(directory) is not None
