"""What else generate can do: every way of decoding gives plain transformers' tokens."""

import copy
import pickle
from typing import Any

import pytest
import torch
from models import CountOperators, error, padded_batch, tiny_model
from transformers import DynamicCache

from llmrt import llm

GENERATE = {"max_new_tokens": 20, "do_sample": False}
SLIDING = ("mistral", "gemma2", "gemma3")  # windows shorter than the sequences


@pytest.fixture(scope="module", params=["llama", *SLIDING, "gpt_bigcode"])
def pair(request: Any) -> tuple[Any, Any]:
    plain = tiny_model(request.param)
    return plain, llm.optimize(plain)


def same(pair: tuple[Any, Any], inputs: dict[str, torch.Tensor], **options: Any) -> bool:
    plain, fast = pair
    torch.manual_seed(3)
    expected = plain.generate(**inputs, **{**GENERATE, **options})
    torch.manual_seed(3)
    return torch.equal(fast.generate(**inputs, **{**GENERATE, **options}), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
        {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "prefill_chunk_size": 4},
        {"num_beams": 2, "length_penalty": 0.5, "early_stopping": True, "repetition_penalty": 1.3},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
        {"use_cache": False},
    ],
    ids=str,
)
def test_ways_of_decoding(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    assert same(pair, padded_batch(), **options)


def test_assisted_and_prompt_lookup(pair: tuple[Any, Any]) -> None:
    prompt = {"input_ids": padded_batch()["input_ids"][:1]}
    plain, fast = pair
    assert same(pair, prompt, assistant_model=plain)
    assert same(pair, prompt, assistant_model=llm.optimize(tiny_model("llama")))  # wrong guesses: the cache is cropped
    assert same(pair, {"input_ids": prompt["input_ids"].repeat(1, 2)}, prompt_lookup_num_tokens=3)
    assert fast.config._attn_implementation == "llmrt"


def test_a_given_transformers_cache_is_used(pair: tuple[Any, Any]) -> None:
    plain, fast = pair
    batch = padded_batch()
    got = fast.generate(**batch, **GENERATE, past_key_values=DynamicCache(config=fast.config))
    assert torch.equal(got, plain.generate(**batch, **GENERATE))
    with CountOperators() as count:
        fast.generate(**batch, **GENERATE, past_key_values=DynamicCache(config=fast.config))
    assert count["kv_append"] == 0 and count["attention"] == 20 * 2


def test_the_hybrid_cache_of_old_files_is_no_request() -> None:
    fast, batch = llm.optimize(tiny_model("gemma2")), padded_batch()
    fast.generation_config.cache_implementation = "hybrid"
    with CountOperators() as count:
        got = fast.generate(**batch, **GENERATE)
    assert count["kv_append"] + count["rope_append"] == 20 * 2
    assert torch.equal(got, tiny_model("gemma2").generate(**batch, **GENERATE))


def test_another_attention_can_be_chosen(pair: tuple[Any, Any]) -> None:
    plain, fast = pair
    fast = copy.deepcopy(fast)
    fast.set_attn_implementation("eager")
    batch = padded_batch()
    expected = plain.generate(**batch, **GENERATE, num_beams=3)
    with CountOperators() as count:
        assert torch.equal(fast.generate(**batch, **GENERATE, num_beams=3), expected)
        assert count["attention"] == count["kv_append"] == 0
        ours = llm.KVCache(fast.config, beams=3)  # read by an attention that knows no row table
        assert torch.equal(fast.generate(**batch, **GENERATE, num_beams=3, past_key_values=ours), expected)
        assert count["attention"] == 0 and count["kv_append"] == 20 * 2


def test_forward_in_pieces(pair: tuple[Any, Any]) -> None:
    plain, fast = pair
    batch = padded_batch(batch=2, tokens=14)
    mask, ids = batch["attention_mask"], batch["input_ids"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = plain(**batch, position_ids=positions).logits
    cache, outs = llm.KVCache(fast.config), []
    for start, end in ((0, 6), (6, 7), (7, 11), (11, 14)):
        part = {"position_ids": positions[:, start:end], "attention_mask": mask[:, :end]}
        outs.append(fast(ids[:, start:end], **part, past_key_values=cache).logits)
    assert error(torch.cat(outs, 1), expected, mask) < 1e-4


def test_hidden_states_and_no_attention_weights(pair: tuple[Any, Any]) -> None:
    plain, fast = pair
    batch = padded_batch()
    hidden = fast(**batch, output_hidden_states=True).hidden_states
    for got, expected in zip(hidden, plain(**batch, output_hidden_states=True).hidden_states, strict=True):
        assert error(got, expected, batch["attention_mask"]) < 1e-4
    with pytest.raises(ValueError, match="output_attentions=True"):
        fast(**batch, output_attentions=True)


def test_copies_are_independent() -> None:
    # a model that no other test asked for hidden states: transformers' hooks for them cannot be pickled
    plain, batch = tiny_model("phi3"), padded_batch()
    config = llm.WeightOnlyQuantConfig(group_size=32)
    fast = llm.optimize(plain, quantization_config=config)
    expected = fast.generate(**batch, **GENERATE, num_beams=2)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(other) is type(fast)
        with CountOperators() as count:
            assert torch.equal(other.generate(**batch, **GENERATE, num_beams=2), expected)
        assert count["kv_append"] + count["rope_append"] == 40
        cache = other.generate(**batch, max_new_tokens=2, return_dict_in_generate=True).past_key_values
        assert isinstance(cache, llm.KVCache)
    with torch.inference_mode():
        assert torch.equal(fast.generate(**batch, **GENERATE, num_beams=2), expected)
