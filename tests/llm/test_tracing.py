"""An optimized model under Dynamo: one graph without breaks, the eager results, and no state left behind."""

from typing import Any

import pytest
import torch
from models import MODELS, error, padded_batch, tiny_model
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_sliding_window_causal_mask

from llmrt import llm
from llmrt.llm.linear import LinearGroup

INT4 = llm.WeightOnlyQuantConfig(group_size=32)
CACHES = {
    "none": lambda model: None,
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=24),
    "llmrt": lambda model: llm.KVCache(model.config),
}


class Graphs:
    """A backend that keeps the graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def count(self, name: str) -> list[int]:
        target = getattr(torch.ops.llmrt, name).default
        return [sum(node.target is target for node in graph.graph.nodes) for graph in self.graphs]


def steps(run: Any, cache: Any, tokens: int) -> list[torch.Tensor]:
    """Return the logits of a padded prompt and of `tokens` more, chosen greedily."""
    batch = padded_batch()
    mask, positions = batch["attention_mask"], (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    options = {"use_cache": False} if cache is None else {"past_key_values": cache}
    logits = [run(**batch, position_ids=positions, **options).logits]
    for _ in range(tokens if cache is not None else 0):
        mask, positions = torch.cat([mask, mask.new_ones(3, 1)], 1), positions[:, -1:] + 1
        ids = logits[-1][:, -1:].argmax(-1)
        logits.append(run(input_ids=ids, attention_mask=mask, position_ids=positions, **options).logits)
    return logits


#: Families whose graphs are also run where a cache's length is a symbol: one of each kind.
SYMBOLIC = ("llama", "gemma3", "phi3", "opt")


def check(name: str, cache: str, quantization: Any) -> Graphs:
    torch._dynamo.reset()
    model = llm.optimize(tiny_model(name), quantization_config=quantization, deployment_mode=False)
    backend = Graphs()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    tokens = 2 if name in SYMBOLIC else 1
    expected = steps(model, CACHES[cache](model), tokens)
    for got, wanted in zip(steps(compiled, CACHES[cache](model), tokens), expected, strict=True):
        assert error(got[:, -1:], wanted[:, -1:]) < 1e-5
    assert all(m._pending == [None] for m in model.modules() if isinstance(m, LinearGroup))
    return backend


#: Every family with transformers' caches; one of each kind (window, gated, learned positions) without a cache and with ours.
CASES = [(name, cache) for name in MODELS for cache in ("dynamic", "static")]
CASES += [(name, cache) for name in SYMBOLIC for cache in ("none", "llmrt")]


@pytest.mark.parametrize(("name", "cache"), CASES)
def test_int4_models_compile_to_whole_graphs(name: str, cache: str) -> None:
    backend = check(name, cache, INT4)
    assert set(backend.count("quant_linear")) == {2 * MODELS[name].linears + 1}, "siblings are one product in the graph"
    assert set(backend.count("attention")) == {2}
    assert len(backend.graphs) <= 3


@pytest.mark.parametrize("name", ["llama", "gemma2", "glm", "gpt_neox", "opt"])
def test_float_models_compile_to_whole_graphs(name: str) -> None:
    backend = check(name, "dynamic", None)
    assert set(backend.count("attention")) == {2} and len(backend.graphs) <= 3
    assert all(count > 0 for count in backend.count("rope")) == MODELS[name].rope


def test_masks_of_other_patterns_stay_whole_in_a_graph() -> None:
    torch._dynamo.reset()
    config = llm.optimize(tiny_model("mistral"), deployment_mode=False).config

    def masks(x: torch.Tensor, padding: torch.Tensor) -> list[torch.Tensor]:
        deviation = create_sliding_window_causal_mask(config, x, padding, None, and_mask_function=without_token_2)
        return [create_sliding_window_causal_mask(config, x, padding, None), deviation]

    x, padding = torch.zeros(3, 11, 48), padded_batch()["attention_mask"]
    got, expected = torch.compile(masks, backend="eager", fullgraph=True)(x, padding), masks(x, padding)
    assert [mask.dim() for mask in got] == [2, 4]
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def without_token_2(batch: Any, head: Any, query: Any, token: Any) -> Any:
    return token != 2


def test_padding_of_another_prompt_reaches_the_same_graph() -> None:
    torch._dynamo.reset()
    model = llm.optimize(tiny_model("llama"), deployment_mode=False)
    backend, batch = Graphs(), padded_batch()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    whole = torch.ones_like(batch["attention_mask"])
    for mask in (whole, batch["attention_mask"]):
        got = compiled(batch["input_ids"], attention_mask=mask, use_cache=False).logits
        assert error(got, model(batch["input_ids"], attention_mask=mask, use_cache=False).logits, mask) < 1e-5
    assert len(backend.graphs) == 1
