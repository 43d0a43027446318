"""Caches that store keys and values in another dtype than the model's: int8 with a scale per token and head, float16."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CountOperators, padded_batch, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from llmrt import llm, ops

#: Largest root-mean-square difference of logits that the rounding of keys and values may make.
TOLERANCE = {"int8": 0.03, "float16": 2e-3}


def pair(name: str, kv_dtype: str, **options: Any) -> tuple[Any, Any]:
    """Return a model optimized with and without a dtype for its cache."""
    model = tiny_model(name)
    return llm.optimize(model, kv_dtype=kv_dtype, **options), llm.optimize(model, **options)


def run(model: Any, new: int = 6, **options: Any) -> Any:
    """Generate greedily for a padded batch."""
    ids, mask = padded_batch().values()
    settings = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, attention_mask=mask, **settings | options)


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("deployment_mode", [True, False])
@pytest.mark.parametrize("kv_dtype", ["int8", "float16"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_neox"])
def test_logits_are_near(name: str, kv_dtype: str, deployment_mode: bool) -> None:
    model, plain = pair(name, kv_dtype, deployment_mode=deployment_mode)
    ids, mask = padded_batch().values()
    caches = [llm.KVCache(model.config), llm.KVCache(plain.config)]
    for start, end in ((0, ids.shape[1] - 2), (ids.shape[1] - 2, ids.shape[1] - 1), (ids.shape[1] - 1, ids.shape[1])):
        with torch.no_grad():
            got, expected = (
                m(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=c, use_cache=True).logits[:, -1]
                for m, c in zip((model, plain), caches, strict=True)
            )
        assert 0 < difference(got, expected) < TOLERANCE[kv_dtype]
    assert all(layer.key_cache.dtype == getattr(torch, kv_dtype) for layer in caches[0].layers)
    assert caches[1].layers[0].key_cache.dtype == torch.float32
    if deployment_mode:
        assert not model.forward.reasons and len(model.forward.graphs) == 2


def test_generate_stores_int8() -> None:
    model, plain = pair("llama", "int8")
    got, expected = run(model), run(plain)
    layer = got.past_key_values.layers[0]
    assert layer.key_cache.dtype == layer.value_cache.dtype == torch.int8
    assert layer.key_cache.shape[3] == ops.stored_width(
        expected.past_key_values.layers[0].key_cache.shape[3], torch.int8
    )
    assert got.sequences.shape == expected.sequences.shape
    assert difference(got.logits[0], expected.logits[0]) < TOLERANCE["int8"]


def test_beams_equal_a_search_that_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("llama", "int8")
    modules, _ = pair("llama", "int8", deployment_mode=False)
    options = {"num_beams": 4, "num_return_sequences": 2, "new": 8}
    run(model, **options)  # graphs are compared with modules when they are captured
    with CountOperators() as count:
        got = run(model, **options)
    assert count["attention"] == count["kv_append"] + count["rope_append"] == 8 * model.config.num_hidden_layers
    with CountOperators() as other:
        assert torch.equal(got.sequences, run(modules, **options).sequences)
    assert other["attention"] == other["kv_append"] + other["rope_append"] == count["attention"]
    assert got.past_key_values.rows.table is not None

    def copied(self: Any, beam_idx: torch.Tensor) -> None:
        for layer in self.layers:
            layer.key_cache, layer.value_cache = layer.key_cache[beam_idx], layer.value_cache[beam_idx]

    monkeypatch.setattr(llm.KVCache, "reorder_cache", copied)
    monkeypatch.setattr(
        "llmrt.llm.cache_setup.KVCache", lambda config, max_length, beams: llm.KVCache(config, max_length)
    )
    with CountOperators() as other:
        assert torch.equal(got.sequences, run(modules, **options).sequences)
    assert other["attention"] == count["attention"]


def test_growing_cropping_repeating_and_copies() -> None:
    cache = llm.KVCache(LlamaConfig(num_hidden_layers=1), max_length=4, kv_dtype=torch.int8)
    first, second = torch.randn(2, 2, 3, 3, 8).unbind(0)
    for tokens in (first, second):
        cache.update(tokens, tokens * 2, 0)
    layer = cache.layers[0]
    held = torch.cat((first, second), 2)
    assert layer.key_cache.shape[2] >= 6 and layer.keys.dtype == torch.float32
    torch.testing.assert_close(layer.keys, held, atol=0.02, rtol=0)
    torch.testing.assert_close(layer.values, held * 2, atol=0.04, rtol=0)
    other = copy.deepcopy(cache)
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(layer.keys, held[:, :, :4].repeat_interleave(2, 0), atol=0.02, rtol=0)
    loaded = pickle.loads(pickle.dumps(other)).layers[0]
    assert torch.equal(loaded.keys, other.layers[0].keys) and loaded.key_cache.dtype == torch.int8


def test_another_attention_gets_floating_keys() -> None:
    model, _ = pair("llama", "int8", deployment_mode=False)
    ids, mask = padded_batch().values()
    settings = {"attention_mask": mask, "use_cache": True}
    with torch.no_grad():
        expected = model(ids, past_key_values=llm.KVCache(model.config), **settings).logits
        model.set_attn_implementation("eager")
        got = model(ids, past_key_values=llm.KVCache(model.config), **settings).logits
    torch.testing.assert_close(got[:, -1], expected[:, -1], atol=2e-4, rtol=2e-4)


def test_the_choice_is_saved(tmp_path: Path) -> None:
    model, _ = pair("llama", "int8")
    model.save_pretrained(tmp_path)
    loaded = llm.optimize(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert run(loaded).past_key_values.layers[0].key_cache.dtype == torch.int8
    assert llm.KVCache(loaded.config, kv_dtype="float32").kv_dtype == torch.float32


def test_export_takes_int8_buffers() -> None:
    model, _ = pair("llama", "int8", deployment_mode=False)
    program = llm.export(model).module()
    cached = llm.CachedModel(model)
    keys, values = cached.caches(2, 12)
    assert keys[0].dtype == torch.int8
    ids, cache = torch.randint(3, 90, (2, 5)), llm.KVCache(model.config)
    with torch.no_grad():
        got = program(ids, torch.ones_like(ids), keys, values)
        expected = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    (codes, scales), (others, their_scales) = (
        (buffer[:, :, :5, :-4].int(), buffer[:, :, :5, -4:].contiguous().view(torch.float32))
        for buffer in (keys[0], cache.layers[0].key_cache)
    )
    assert (codes - others).abs().max() <= 1, "the exported linears add in another order"
    torch.testing.assert_close(scales, their_scales, rtol=1e-5, atol=0)


def test_refusals() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"kv_dtype is 'int4'; valid: int8, float16, bfloat16, float32"):
        llm.optimize(model, kv_dtype="int4")
    with pytest.raises(ValueError, match="kv_dtype is bfloat16 for a float32 model; valid: float32, float16, int8"):
        llm.optimize(model, kv_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"cache_implementation is 'static'.*leave cache_implementation out"):
        run(llm.optimize(model, kv_dtype="int8"), cache_implementation="static")
