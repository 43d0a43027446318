"""A whole model on transformers' StaticCache: its cache updates and counters are part of one operator per layer."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from llmrt.passes import RewriteReport, rewrite
from llmrt.passes.nodes import VIEWS
from llmrt.passes.retrace import retrace

LAYERS = 3


pytestmark = pytest.mark.usefixtures("fresh_dynamo", "without_gradients")


class Spy:
    """A compile backend that keeps what it made."""

    def __init__(self) -> None:
        self.made: list[tuple[GraphModule, RewriteReport]] = []

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Any:
        traced = retrace(gm, inputs)
        self.made.append((traced, rewrite(traced, strict=True)))
        return traced.forward


def model_of(layers: int, **options: Any) -> tuple[LlamaForCausalLM, LlamaConfig]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=50, num_hidden_layers=layers, max_position_embeddings=64, **sizes, **options)
    return LlamaForCausalLM(config).eval(), config


def operators(gm: GraphModule) -> list[str]:
    """Return the calls that do something: views and parts of tuples do not."""
    calls = [node.target for node in gm.graph.nodes if node.op == "call_function" and node.target not in VIEWS]
    return [str(target) for target in calls if "llmrt." in str(target) or "aten." in str(target)]


def assert_caches_equal(one: StaticCache, other: StaticCache) -> None:
    for a, b in zip(one.layers, other.layers, strict=True):
        torch.testing.assert_close([a.keys, a.values], [b.keys, b.values])
        assert a.cumulative_length == b.cumulative_length


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dynamic", [None, True])
def test_prefill_and_decode_equal_eager(dynamic: bool | None, masked: bool) -> None:
    spy, (model, config) = Spy(), model_of(LAYERS)
    compiled = torch.compile(model, backend=spy, fullgraph=True, dynamic=dynamic)
    caches = [StaticCache(config, max_cache_len=16) for _ in range(2)]
    ids = torch.randint(0, 50, (2, 9))
    mask = torch.arange(9) >= torch.tensor([[2], [0]])
    for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
        given = {"attention_mask": mask[:, :end]} if masked else {}
        expected = model(ids[:, start:end], past_key_values=caches[0], **given).logits
        actual = compiled(ids[:, start:end], past_key_values=caches[1], **given).logits
        torch.testing.assert_close(actual, expected)
        assert_caches_equal(*caches)
    for gm, report in spy.made:
        assert report.fired["kv_append"] == report.fired["rope_append"] == LAYERS, report
        left = " ".join(operators(gm))
        assert "index_copy" not in left and "add_." not in left and "llmrt.rope." not in left


def test_operators_per_layer_of_decode() -> None:
    counts = []
    for layers in (1, 3):
        spy, (model, config) = Spy(), model_of(layers)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=spy, fullgraph=True)
        cache = StaticCache(config, max_cache_len=16)
        for tokens in (5, 1, 1):
            compiled(torch.zeros(2, tokens, dtype=torch.int64), past_key_values=cache)
        counts.append(operators(spy.made[-1][0]))
    extra = sorted(counts[1])
    for name in counts[0]:
        extra.remove(name)
    assert len(extra) <= 2 * 8, extra


def test_results_that_are_caches_stay() -> None:
    def function(keys: Tensor, values: Tensor, count: Tensor, new: Tensor) -> Any:
        places = torch.arange(new.shape[2]) + count
        count.add_(new.shape[2])
        return keys.index_copy_(2, places, new), values.index_copy_(2, places, new), count

    spy = Spy()
    compiled = torch.compile(function, backend=spy, fullgraph=True)
    keys, values, count = torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4), torch.tensor(2)
    results = compiled(keys, values, count, torch.ones(1, 2, 3, 4))
    assert all(result is given for result, given in zip(results, (keys, values, count), strict=True))
    assert spy.made[0][1].fired["kv_append"] == 1 and count == 5 and keys[:, :, 2:5].all() and keys.sum() == 24
