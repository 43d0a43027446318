"""The card of a saved model: its metadata, its words, and that its example works in a fresh process."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from models import tiny_model
from test_static import static
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrt import llm
from llmrt.llm.commands.quantize import write
from llmrt.llm.model_card import MARK, base_model


def quantized(**options: Any) -> Any:
    return llm.optimize(
        tiny_model("llama"), quantization_config=llm.WeightOnlyQuantConfig(**{"group_size": 32, **options})
    )


def test_the_example_works_in_a_fresh_process(tmp_path: Path) -> None:
    demo = llm.demo_model_path()
    model = llm.AutoModelForCausalLM.from_pretrained(demo, load_in_4bit=True)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    tokenizer.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example is not None and "pip install llmrt" in text and "llmrt.llm" in example[1].splitlines()[0]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", example[1]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    inputs = tokenizer("Hello", return_tensors="pt")
    again = llm.AutoModelForCausalLM.from_pretrained(tmp_path, deployment_mode=False)
    expected = again.generate(**inputs, max_new_tokens=20)[0]
    assert run.stdout.strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_the_hub_reads_the_metadata(tmp_path: Path) -> None:
    model = quantized(lm_head=False, layouts={"model.layers.0.mlp.down_proj": "int8_asym_channel_f32"})
    model.config._name_or_path = "someone/Tiny-1B"
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "someone/Tiny-1B" and data["base_model_relation"] == "quantized"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["llmrt", "int4", "int8"] and model.model_tags == ["llmrt"]
    for line in (
        "| `int4_sym_g32_bf16` | 4-bit integers and a bfloat16 scale for each 32 inputs of a row | 13 |",
        "| `int8_asym_channel_f32` | 8-bit integers, a zero point and a float32 scale for each row | 1 |",
        "| `float32` | floating point | 1 |",
        "quantized by rounding to nearest, in the format of llmrt (`quant_method: llmrt`)",
        "# Tiny-1B, quantized for llmrt",
    ):
        assert line in card.text or line in card.content, line


def test_static_models_have_one(tmp_path: Path) -> None:
    static(tiny_model("llama"), tmp_path).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "quant_method: llmrt-static" in text and "| `int8_sym_channel_f32` |" in text and "base_model" not in text


def test_a_card_of_the_owner_stays(tmp_path: Path) -> None:
    model, card = quantized(), tmp_path / "README.md"
    card.write_text("mine")
    llm.save_quantized(model, tmp_path)
    assert card.read_text() == "mine"
    card.unlink()
    model.save_pretrained(tmp_path)
    assert MARK in card.read_text() and "int4_sym" in card.read_text()
    quantized(weight_dtype="nf4").save_pretrained(tmp_path)
    assert "nf4_sym_g32_bf16" in card.read_text() and "int4_sym" not in card.read_text(), (
        "a card of llmrt's is kept right"
    )
    card.write_text(card.read_text().replace(MARK, ""))
    model.save_pretrained(tmp_path)
    assert "nf4_sym" in card.read_text(), "edited by its owner"


def test_only_the_main_process_and_only_quantized_models_write(tmp_path: Path) -> None:
    quantized().save_pretrained(tmp_path / "a", is_main_process=False)
    llm.optimize(tiny_model("llama")).save_pretrained(tmp_path / "b")
    assert not list(tmp_path.glob("*/README.md"))
    model = quantized()
    model.dequantize()
    model.save_pretrained(tmp_path / "c")
    assert not (tmp_path / "c" / "README.md").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert "save_pretrained" not in loaded.__dict__


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("/cache/hub/models--meta-llama--Llama-3.2-1B/snapshots/4e20", "meta-llama/Llama-3.2-1B"),
        ("/data/secret/model", None),
        ("./models/x", None),
        ("../x", None),
        ("tests/llm", None),
        ("", None),
        (None, None),
    ],
)
def test_base_models(name: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    model = tiny_model("llama")
    monkeypatch.setattr(model.config, "_name_or_path", name)
    assert base_model(model) == expected


def test_a_forced_write_into_a_directory_keeps_its_card(tmp_path: Path) -> None:
    """As of ``llmrt quantize --force`` and ``llmrt convert --force``."""
    loaded: Any = SimpleNamespace(model=quantized(), tokenizer=SimpleNamespace(save_pretrained=lambda path: None))
    (tmp_path / "README.md").write_text("mine")
    write(loaded, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and (tmp_path / "model.safetensors").exists()
    (tmp_path / "README.md").write_text(MARK)
    write(loaded, tmp_path)
    assert "int4_sym_g32_bf16" in (tmp_path / "README.md").read_text()
