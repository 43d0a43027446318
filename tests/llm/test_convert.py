"""``llmrt convert``, and other commands on directories of other formats."""

import json
from pathlib import Path

import pytest
import torch
from gptq_directories import TINY_READERS, save_gptq
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from llmrt import llm
from llmrt.llm.checkpoints import readers
from llmrt.llm.cli import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(readers, "READERS", TINY_READERS)
    model = AutoModelForCausalLM.from_pretrained(llm.demo_model_path(), dtype=torch.float32)
    save_gptq(model.requires_grad_(False), tmp_path / "gptq", act_order=True)
    AutoTokenizer.from_pretrained(llm.demo_model_path()).save_pretrained(tmp_path / "gptq")
    return tmp_path / "gptq"


def test_the_same_numbers_in_our_format(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("convert", str(source), str(out), "--max-shard-size", "1MB")
    assert done.exit_code == 0, done.output
    assert "g16_f16" in done.stdout and "from tiny-gptq" in done.stdout
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "llmrt"
    ids = torch.arange(3, 20)[None]
    expected = llm.AutoModelForCausalLM.from_pretrained(source)(ids).logits
    assert torch.equal(llm.from_quantized(out)(ids).logits, expected)
    texts = [run("generate", str(path), "def main(", "-n", "8") for path in (source, out)]
    assert texts[0].exit_code == 0 and texts[0].stdout == texts[1].stdout
    twice = run("quantize", str(source), str(tmp_path / "twice"))
    assert twice.exit_code == 2 and "is quantized already" in twice.stderr
    floating = run("convert", "demo", str(tmp_path / "float"))
    assert floating.exit_code == 2 and "demo is not quantized; llmrt quantize" in floating.stderr
    size = run("convert", str(source), str(tmp_path / "size"), "--max-shard-size", "-5")
    assert size.exit_code == 2 and "--max-shard-size is '-5'" in size.stderr


def test_bench_takes_it(source: Path) -> None:
    done = run("bench", str(source), "-p", "4", "-n", "2", "--iters", "1", "--warmup", "0", "--json", "-", "--no-table")
    assert done.exit_code == 0, done.output
    settings = json.loads(done.stdout)["settings"]
    assert (settings["group_size"], settings["scheme"], settings["lm_head"]) == (16, "asym", "none")
