"""Damaged and hostile directories of other formats: a ValueError that names the tensor or file, before memory is taken."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_directories import TINY_READERS, edit_json, save_gptq
from models import tiny_model
from safetensors.torch import load_file, save_file

from llmrt import llm
from llmrt.llm.checkpoints import readers
from llmrt.llm.checkpoints.files import TensorFiles, weight_files

Q = "model.layers.1.self_attn.q_proj."
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def tiny_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "READERS", TINY_READERS)


def saved(directory: Path, name: str = "llama") -> None:
    save_gptq(copy.deepcopy(tiny_model(name)), directory)


def refused(directory: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q + "qweight"), "the checkpoint has no model.layers.1.self_attn.q_proj.weight"),
        (lambda t: t.pop(Q + "scales"), "q_proj.scales is None; expected"),
        (lambda t: t.update({Q + "qweight": t[Q + "qweight"][:3]}), r"q_proj.qweight is Entry\(shape=\(3, 48\)"),
        (lambda t: t.update({Q + "g_idx": t[Q + "g_idx"].long()}), "q_proj.g_idx is .*int64"),
        (lambda t: t[Q + "g_idx"].fill_(1000), "q_proj.g_idx is out of range"),
        (lambda t: t[Q + "g_idx"].fill_(-1), "q_proj.g_idx is out of range"),
        (lambda t: t[Q + "scales"].fill_(torch.nan), "q_proj.*scales has NaN or infinite values"),
        (lambda t: t.update({Q + "bias": torch.zeros(47)}), r"q_proj.bias is torch.float32 \[47\]; expected floating \[48\]"),
        (lambda t: t.update({Q + "bias": torch.zeros(48).int()}), "q_proj.bias is torch.int32"),
        (lambda t: t.pop("model.norm.weight"), "the checkpoint has no model.norm.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(47)}), r"model.norm.weight has shape \[47\]; expected \[48\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(48).int()}), "model.norm.weight has dtype int32"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(96, 48).to(torch.float8_e4m3fn)}),
            "lm_head.weight has dtype float8_e4m3fn; expected float32",
        ),
        (lambda t: t.update({"model.layers.7.mlp.up_proj.qweight": t[Q + "qweight"]}), "layers.7.mlp.up_proj are quantized .* no linear"),
        (lambda t: t.update({"q.qweight": t[Q + "qweight"]}), "q are quantized in the checkpoint and no linear of Llama"),
    ],
    ids=[
        "no codes", "no scales", "rows", "dtype", "large group", "negative group", "NaN scale", "bias shape", "bias dtype",
        "no norm", "norm shape", "norm dtype", "float8 without scale", "unknown layer", "unknown name",
    ],
)  # fmt: skip
def test_tensors(change: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, message)


def test_a_missing_bias(tmp_path: Path) -> None:
    saved(tmp_path, "qwen2")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[Q + "bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, "the checkpoint has no model.layers.1.self_attn.q_proj.bias")


def test_sizes_of_the_configuration(tmp_path: Path) -> None:
    """Sizes of terabytes: nothing is allocated, since no tensor of the file has them."""
    saved(tmp_path)
    edit_json(tmp_path / "config.json", lambda c: c.update(vocab_size=1 << 40))
    refused(tmp_path, r"config.json asks for \d+ values of parameters; the checkpoint")
    edit_json(tmp_path / "config.json", lambda c: c.update(vocab_size=96, intermediate_size=1 << 40))
    refused(tmp_path, "proj.qweight is Entry.*137438953472")


def test_nothing_is_quantized(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    edit_json(
        tmp_path / "config.json", lambda c: c.update(quantization_config={"quant_method": "tiny-gptq", "bits": 4})
    )
    refused(tmp_path, "says that the checkpoint is quantized, but no linear in its files is")


def sharded(directory: Path) -> dict[str, Any]:
    """Write a directory of two shards and return its index."""
    saved(directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for shard, part in (("a.safetensors", names[:9]), ("b.safetensors", names[9:])):
        save_file({n: tensors[n] for n in part}, directory / shard, {"format": "pt"})
        index["weight_map"].update(dict.fromkeys(part, shard))
    (directory / INDEX).write_text(json.dumps(index))
    return index


def test_indices(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    llm.AutoModelForCausalLM.from_pretrained(tmp_path)
    first = next(iter(index["weight_map"]))

    def write(**changes: Any) -> None:
        (tmp_path / INDEX).write_text(json.dumps({**index, **changes}))

    for value, message in (
        ("c.safetensors", "names c.safetensors, which is not there"),
        ("../b.safetensors", "valid: files of the directory itself"),
        ("b.safetensors", f"says that {first} is in b.safetensors, which has no such tensor"),
    ):
        write(weight_map={**index["weight_map"], first: value})
        refused(tmp_path, message)
    write(weight_map=[1])
    refused(tmp_path, "weight_map does not map names")
    text = json.dumps(index).replace('"weight_map": {', f'"weight_map": {{"{first}": "a.safetensors", ')
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, f"{first}' is there twice")
    (tmp_path / INDEX).write_text("{")
    refused(tmp_path, "no usable JSON")
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / "b.safetensors").unlink()
    refused(tmp_path, "names b.safetensors, which is not there: the checkpoint is not complete")


def test_files(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    first = next(iter(index["weight_map"]))
    more = load_file(tmp_path / "b.safetensors")
    save_file({**more, first: torch.zeros(3)}, tmp_path / "b.safetensors", {"format": "pt"})
    refused(tmp_path, f"{first} is in two files, a.safetensors and b.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for content in (whole[:-100], whole[:4], b"", b"\xff" * 100):
        (tmp_path / "a.safetensors").write_bytes(content)
        refused(tmp_path, "a.safetensors is no readable safetensors file")


class Code:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


def test_torch_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = llm.AutoModelForCausalLM.from_pretrained(tmp_path)(torch.arange(5)[None]).logits
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert torch.equal(llm.AutoModelForCausalLM.from_pretrained(tmp_path)(torch.arange(5)[None]).logits, expected)
    with pytest.raises(ValueError, match="weights_only: valid: True"):
        llm.AutoModelForCausalLM.from_pretrained(tmp_path, weights_only=False)
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    refused(tmp_path, "holds a list; expected a dict of tensors")
    torch.save({"x": 1}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "'x' is a int; expected names and tensors")
    for write in (torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))):
        write({"x": Code()}, tmp_path / "pytorch_model.bin")
        refused(tmp_path, "is no file of tensors")
        edit_json(tmp_path / "config.json", lambda c: c.pop("quantization_config", None))
        refused(tmp_path, "torch file")
        edit_json(
            tmp_path / "config.json", lambda c: c.update(quantization_config={"quant_method": "tiny-gptq", "bits": 4})
        )
    assert "this must not run" not in capsys.readouterr().out


def test_headers_are_all_that_is_read(tmp_path: Path) -> None:
    save_file(
        {"a.b": torch.arange(6.0).view(2, 3), "c": torch.ones(1).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors"
    )
    files = TensorFiles([tmp_path / "x.safetensors"])
    assert files.entries["a.b"] == ((2, 3), torch.float32) and files.groups()["a"]["b"].shape == (2, 3)
    assert files.read("a.b").untyped_storage().nbytes() == 24, "a tensor alone, not a mapping of the file"
    assert weight_files(str(tmp_path)) == [], "neither weights of a usual name nor an index"
