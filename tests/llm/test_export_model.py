"""Optimized models through torch.export: with and without a cache, saved, loaded, packaged, and run where only llmrt is known."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, PAD, error, padded_batch, tiny_model
from torch.export import Dim
from transformers import DynamicCache
from transformers.integrations.executorch import (
    TorchExportableModuleForDecoderOnlyLM,
    register_dynamic_cache_export_support,
)

from llmrt import llm
from llmrt.llm.linear import LinearGroup

ROOT = Path(__file__).parents[2]
D = Dim.DYNAMIC
INT4 = llm.WeightOnlyQuantConfig(group_size=32)


def optimized(name: str, kind: str = "int4") -> Any:
    """Return a tiny model in INT4, or in a floating dtype."""
    options = {"quantization_config": INT4} if kind == "int4" else {"dtype": getattr(torch, kind)}
    return llm.optimize(tiny_model(name), deployment_mode=False, **options)


def greedy(run: Any, cached: llm.CachedModel, batch: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    """Return prompt and `tokens` more, as `run` with the signature of `CachedModel` continues them."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    whole, (keys, values) = ids, cached.caches(ids.shape[0], ids.shape[1] + tokens)
    for _ in range(tokens):
        ids = run(ids, mask, keys, values)[:, -1:].argmax(-1)
        whole, mask = torch.cat([whole, ids], 1), torch.cat([mask, torch.ones_like(ids)], 1)
    return whole


@pytest.mark.parametrize(("strict", "names"), [(False, list(MODELS)), (True, ["llama", "gemma2", "opt"])])
def test_one_program_continues_prompts_as_generate_does(strict: bool, names: list[str]) -> None:
    for name in names:
        model = optimized(name)
        run, cached = llm.export(model, strict=strict).module(), llm.CachedModel(model)
        for batch in (padded_batch(3, 11), padded_batch(1, 1), padded_batch(1, 6)):
            expected = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=PAD)
            assert torch.equal(greedy(run, cached, batch, 5), expected), name


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_floating_point_models_write_their_caches(kind: str) -> None:
    model = optimized("qwen3", kind)
    run, cached, batch = llm.export(model).module(), llm.CachedModel(model), padded_batch(2, 7)
    expected, actual = cached.caches(2, 9), cached.caches(2, 9)
    assert expected[0][0].dtype == getattr(torch, kind)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    near = (
        {"rtol": 1e-4, "atol": 1e-4} if kind == "float32" else {"rtol": 0.05, "atol": 0.1}
    )  # torch's linears are exported
    for i in range(3):
        args = (ids[:, -1:] if i else ids, torch.cat([mask, mask.new_ones(2, i)], 1))
        logits = run(*args, *actual)
        torch.testing.assert_close(logits, cached(*args, *expected), **near)
        assert logits.shape[1] == 1
        ids = torch.cat([ids, logits.argmax(-1)], 1)
    for got, wanted in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(got[1, :, 3:], wanted[1, :, 3:], **near)  # behind the padding


def test_a_cache_that_is_full_says_so() -> None:
    cached = llm.CachedModel(optimized("llama"))
    batch = padded_batch(1, 6)
    with pytest.raises(RuntimeError, match="do not fit into the cache's capacity of 5 tokens"):
        cached(batch["input_ids"], batch["attention_mask"], *cached.caches(1, 5))
    with pytest.raises(ValueError, match="the model's attention is 'sdpa'"):
        llm.export(tiny_model("llama"))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("llama", "int4"), ("gemma3", "bfloat16"), ("opt", "float32")])
def test_a_model_without_cache_is_exported_as_it_is(name: str, kind: str, strict: bool, tmp_path: Path) -> None:
    model, batch = optimized(name, kind), padded_batch()
    shapes = {"input_ids": {0: D, 1: D}, "attention_mask": {0: D, 1: D}, "use_cache": None}
    program = torch.export.export(model, (), {**batch, "use_cache": False}, dynamic_shapes=shapes, strict=strict)
    assert all(m._pending == [None] for m in model.modules() if isinstance(m, LinearGroup)), "no fake tensor stays"
    torch.export.save(program, tmp_path / "model.pt2")
    run = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (padded_batch(2, 17), padded_batch(1, 4), padded_batch(1, 1)):
        expected = model(**batch, use_cache=False).logits
        assert error(run(**batch, use_cache=False).logits, expected, batch["attention_mask"]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_static_cache_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = optimized(name), padded_batch(1, 5)
    monkeypatch.setattr(model.generation_config, "cache_implementation", "static")
    recipe = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=12)
    program = recipe.export(input_ids=batch["input_ids"][:, :1], cache_position=torch.tensor([0]), strict=False)
    run, expected = program.module(), model(**batch, use_cache=False).logits
    for i in range(5):
        logits = run(input_ids=batch["input_ids"][:, i : i + 1], cache_position=torch.tensor([i]))
        assert error(logits, expected[:, i : i + 1]) < 1e-5


def test_the_dynamic_cache_of_transformers() -> None:
    register_dynamic_cache_export_support()
    model, batch = optimized("llama"), padded_batch(2, 6)
    layers = len(model.model.layers)

    def call(ids: torch.Tensor, tokens: int) -> dict[str, Any]:
        """Return the arguments of a step whose past is all but the last of `tokens` tokens."""
        cache = DynamicCache(config=model.config)
        model(ids[:, : tokens - 1], past_key_values=cache)
        mask = torch.ones(ids.shape[0], tokens, dtype=torch.int64)
        return {"input_ids": ids[:, tokens - 1 : tokens], "attention_mask": mask, "past_key_values": cache}

    caches = [[{0: D, 2: D}] * layers] * 2
    shapes = {"input_ids": {0: D}, "attention_mask": {0: D, 1: D}, "past_key_values": caches}
    run = torch.export.export(model, (), call(batch["input_ids"], 5), dynamic_shapes=shapes, strict=False).module()
    ids = padded_batch(1, 9)["input_ids"].expand(3, -1)
    expected, step = model(ids, use_cache=False).logits, call(ids, 7)
    for tokens in (7, 8, 9):
        step["input_ids"], step["attention_mask"] = ids[:, tokens - 1 : tokens], torch.ones(3, tokens).long()
        out = run(**step)
        step["past_key_values"] = out.past_key_values
        assert error(out.logits[:, -1], expected[:, tokens - 1]) < 1e-5


#: argv: folder with a saved INT4 model. Leaves the program, an AOTInductor package, empty caches.
EXPORT = """
import sys
import torch
from transformers import AutoModelForCausalLM
from llmrt import llm
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
program = llm.export(model)
torch.export.save(program, f"{folder}/program.pt2")
quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/aoti.pt2", inductor_configs=quick)
torch.save(llm.CachedModel(model).caches(3, 16), f"{folder}/caches.pt")
"""
RUN = """
import sys
import llmrt
import torch
folder = sys.argv[1]
aoti = torch._inductor.aoti_load_package(f"{folder}/aoti.pt2")
for run in (torch.export.load(f"{folder}/program.pt2").module(), aoti):
    batch, expected = torch.load(f"{folder}/calls.pt")
    keys, values = torch.load(f"{folder}/caches.pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    whole = ids
    for _ in range(5):
        ids = run(ids, mask, keys, values).argmax(-1)
        whole, mask = torch.cat([whole, ids], 1), torch.cat([mask, torch.ones_like(ids)], 1)
    assert torch.equal(whole, expected), (whole, expected)
assert "transformers" not in sys.modules
"""


def test_a_saved_model_is_exported_in_one_process_and_run_in_another(tmp_path: Path) -> None:
    model, batch = optimized("llama"), padded_batch(3, 11)
    model.save_pretrained(tmp_path)
    expected = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=PAD)
    torch.save((batch, expected), tmp_path / "calls.pt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for script in (EXPORT, RUN):
        command = [sys.executable, "-c", script, str(tmp_path)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
