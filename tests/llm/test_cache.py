"""KVCache against transformers' DynamicCache, layer by layer, and its errors."""

import copy
import pickle
from typing import Any

import pytest
import torch
from models import padded_batch, tiny_model
from transformers import DynamicCache, LlamaConfig

from llmrt import llm

LAYERS, HEADS, DIM = 2, 2, 8
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=HEADS,
    hidden_size=32,
    attn_implementation="eager",
)


class Both:
    """The same calls on a KVCache and on a DynamicCache."""

    def __init__(self, batch: int, beams: int = 1, max_length: int | None = None) -> None:
        self.ours = llm.KVCache(CONFIG, max_length=max_length, beams=beams)
        self.theirs = DynamicCache()
        self.batch = batch

    def append(self, tokens: int, same_beams: bool = False) -> None:
        for layer in range(LAYERS):
            shape = (self.batch, tokens, HEADS, DIM)
            key, value = (torch.randn(shape).transpose(1, 2) for _ in range(2))
            if same_beams:  # a prompt is repeated for every beam
                step = self.ours.rows.beams
                key, value = (x[::step].repeat_interleave(step, 0) for x in (key, value))
            got = self.ours.update(key, value, layer)
            for ours, theirs in zip(got, self.theirs.update(key, value, layer), strict=True):
                assert torch.equal(ours, theirs)
        self.check()

    def check(self) -> None:
        assert self.ours.get_seq_length() == self.theirs.get_seq_length()
        assert self.ours.get_mask_sizes(3, 1) == self.theirs.get_mask_sizes(3, 1)
        for ours, theirs in zip(self.ours.layers, self.theirs.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)

    def both(self, method: str, *args: Any) -> None:
        for cache in (self.ours, self.theirs):
            getattr(cache, method)(*args)
        self.check()


@pytest.mark.parametrize("beams", [1, 3])
def test_reordering_moves_no_keys(beams: int) -> None:
    both = Both(batch=2 * beams, beams=beams)
    both.append(5, same_beams=True)
    buffers = [(layer.key_cache, layer.key_cache._version) for layer in both.ours.layers]
    for _ in range(6):
        indices = torch.randint(beams, (2 * beams,)) + torch.arange(2 * beams) // beams * beams
        both.both("reorder_cache", indices)
        assert [(layer.key_cache, layer.key_cache._version) for layer in both.ours.layers] == buffers
        both.append(1)
        both.append(3)
        buffers = [(layer.key_cache, layer.key_cache._version) for layer in both.ours.layers]
    assert len({id(layer.rows) for layer in both.ours.layers}) == 1
    table = both.ours.rows.table
    assert table is not None and table.dtype == torch.int32


def test_the_prompt_of_beams_is_stored_once() -> None:
    both = Both(batch=6, beams=3)
    for layer in range(LAYERS):
        key = torch.randn(2, HEADS, 4, DIM).repeat_interleave(3, 0)
        both.ours.update(key, key, layer)
    cache = both.ours.layers[0].key_cache
    cache[[1, 2, 4, 5]] = torch.nan  # never read
    assert torch.equal(both.ours.layers[0].keys, both.ours.layers[0].values)


def test_growth_crop_and_batch_changes() -> None:
    both = Both(batch=2, max_length=4)
    both.append(3)
    assert both.ours.layers[0].key_cache.shape[2] == 4
    both.append(2)
    assert both.ours.layers[0].key_cache.shape[2] == 8
    both.both("crop", -2)
    both.append(1)
    both.both("reorder_cache", torch.tensor([1, 1]))
    both.append(2)
    both.both("crop", -1)
    both.both("crop", 0)
    both.append(9)
    both.both("batch_repeat_interleave", 3)
    both.batch = 6
    both.append(2)
    both.both("batch_select_indices", torch.tensor([4, 1, 1]))
    both.batch = 3
    both.append(1)
    copied = copy.deepcopy(both.ours)
    both.append(1)
    assert copied.get_seq_length() == both.ours.get_seq_length() - 1
    assert torch.equal(copied.layers[1].keys, both.ours.layers[1].keys[:, :, :-1])
    with pytest.raises(ValueError, match=r"crop\(2\)"):
        both.ours.crop(2)
    both.ours.reset()
    assert both.ours.get_seq_length() == 0
    both.theirs, both.batch = DynamicCache(), 5  # another batch after reset
    both.append(2)
    assert [len(entry) for entry in both.ours] == [3] * LAYERS


def test_a_cache_can_be_stored() -> None:
    plain = tiny_model("qwen3")
    fast, ids = llm.optimize(plain), padded_batch(batch=1)["input_ids"]
    cache = llm.KVCache(fast.config)
    fast(ids[:, :8], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    stored = pickle.loads(pickle.dumps(cache))
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    assert torch.equal(fast.generate(ids, **options, past_key_values=stored), plain.generate(ids, **options))


def test_it_must_fit() -> None:
    key = torch.randn(2, HEADS, 3, DIM)
    cache = llm.KVCache(CONFIG)
    cache.update(key, key, 0)
    for wrong, message in (
        (key[:1], "batch 1, holds 2"),
        (key[:, :1], "key/value heads 1, holds 2"),
        (key[..., :4], "head size 4, holds 8"),
        (key.bfloat16(), "dtype torch.bfloat16, holds torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.update(wrong, wrong, 0)
    with pytest.raises(ValueError, match="no token"):
        cache.update(key[:, :, :0], key[:, :, :0], 0)
    with pytest.raises(ValueError, match="2 layers, layer 2"):
        cache.update(key, key, 2)
    with pytest.raises(ValueError, match="beams is 0"):
        llm.KVCache(CONFIG, beams=0)
    with pytest.raises(ValueError, match="max_length is 0"):
        llm.KVCache(CONFIG, max_length=0)


def test_a_cache_of_another_model_is_refused() -> None:
    batch = padded_batch()
    first, second = (llm.optimize(tiny_model("llama")) for _ in range(2))
    cache = llm.KVCache(first.config)
    first(**batch, past_key_values=cache)
    more = {"input_ids": batch["input_ids"][:, :1], "attention_mask": torch.ones(3, 12)}
    with pytest.raises(ValueError, match="filled by another model"):
        second(**more, past_key_values=copy.deepcopy(cache))
    with pytest.raises(ValueError, match=r"head size 24, holds 12\. It belongs to another model"):
        llm.optimize(tiny_model("gemma"))(**more, past_key_values=copy.deepcopy(cache))
    cache.reset()
    second(**batch, past_key_values=cache)


def test_a_prompt_can_be_kept_and_continued() -> None:
    plain, batch = tiny_model("qwen3"), padded_batch(batch=1)
    fast = llm.optimize(plain)
    ids = batch["input_ids"]
    prompt = llm.KVCache(fast.config)
    fast(ids[:, :8], past_key_values=prompt)
    for beams in (1, 3):
        options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
        expected = plain.generate(ids, **options)
        kept = copy.deepcopy(prompt)
        kept.batch_repeat_interleave(beams)
        assert torch.equal(fast.generate(ids, **options, past_key_values=kept), expected)
    for _ in range(2):  # chat: only the new tokens are computed, the cache goes on
        ids = fast.generate(ids, max_new_tokens=5, do_sample=False, past_key_values=prompt)
    assert torch.equal(ids, plain.generate(batch["input_ids"], max_new_tokens=10, do_sample=False))
