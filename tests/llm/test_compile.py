"""Untouched models of every family through ``backend="llmrt"``: one graph, transformers' results, no recompilation."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compiled_models import CACHES, FAMILIES, LAYERS, NO_FULLGRAPH, NO_GENERATE, Decoding, small_model
from models import error, padded_batch
from torch._dynamo.utils import counters

from llmrt.passes import llmrt_backend

#: Families that are also run on one prompt length after another; beyond the sliding windows of models.py.
RECOMPILED = {"llama", "gemma3", "gpt_neox", "gptj", "bloom", "t5"}
LENGTHS = (10, 13, 12, 17, 20)

#: Norms of a layer and of the rest of the (decoder's) forward, where they are not 2 and 1.
NORMS = {"gemma2": (4, 1), "gemma3": (4, 1), "glm4": (4, 1), "falcon_mqa": (1, 1), "gptj": (1, 1)}
NORMS |= {"codegen": (1, 1), "bloom": (2, 2), "t5": (3, 1), "t5_gated": (3, 1)}

#: Families with a rotation, one operator per layer; norms of queries and keys are part of it.
ROTATED = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3", "gpt_neox", "starcoder2"}
ROTATED |= {"falcon", "falcon_mqa", "glm", "glm4", "gptj", "codegen"}

FAMILY_KINDS = [(name, kind) for name in FAMILIES for kind in CACHES]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def prompts(tokens: int) -> dict[str, torch.Tensor]:
    return padded_batch(2, tokens)


def calls(function: Callable[[], Any]) -> Counter[str]:
    """Count the calls of llmrt's operators, by the profiler: compiled code does not run under a dispatch mode."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = (event.name for event in profile.events())
    return Counter(name.removeprefix("llmrt::") for name in names if name.startswith("llmrt::"))


def leaf_guards(manager: Any) -> int:
    """Return the number of checks in a tree of guards."""
    children = manager.get_child_managers()
    if hasattr(manager, "get_key_value_managers"):
        children = [child for pair in manager.get_key_value_managers().values() for child in pair if child is not None]
    return len(manager.get_leaf_guards()) + sum(map(leaf_guards, children))


def guards(model: Any) -> list[int]:
    """Return the number of guards of each compiled form of a model's forward, shape guards included."""
    entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(type(model).forward.__code__)
    roots = [entry.guard_manager.root for entry in entries]
    return [leaf_guards(root) + len(root.get_epilogue_lambda_guards()) for root in roots]


@pytest.mark.parametrize(("name", "kind"), FAMILY_KINDS)
def test_generate_equals_transformers_without_recompiling(name: str, kind: str) -> None:
    layers, full = LAYERS.get(name, 1), (name, kind) not in NO_FULLGRAPH
    plain, compiled = small_model(name, layers), small_model(name, layers)
    compiled.compile(backend=llmrt_backend, fullgraph=full)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    if kind == "static":
        options["cache_implementation"] = "static"
    if (name, kind) in NO_GENERATE:
        with pytest.raises(ValueError, match="too many values"):
            plain.generate(**prompts(10), **options)
        pytest.skip(NO_GENERATE[name, kind])
    graphs = []
    for tokens in LENGTHS if name in RECOMPILED else LENGTHS[:1]:
        got, expected = (model.generate(**prompts(tokens), **options) for model in (compiled, plain))
        assert torch.equal(got.sequences, expected.sequences)
        assert error(torch.stack(got.logits), torch.stack(expected.logits)) < 1e-4
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] >= 2 and len(set(graphs[2:])) <= 1
    assert full == (not counters["graph_break"])

    forwards = options["max_new_tokens"]
    called = calls(lambda: compiled.generate(**prompts(LENGTHS[0]), **options))
    per_layer, others = NORMS.get(name, (2, 1))
    norms = sum(n for key, n in called.items() if key.endswith("norm"))
    assert norms == forwards * (layers * per_layer + others) or not full
    assert name not in ROTATED or called["rope"] + called["rope_append"] == forwards * layers
    attentions = forwards * layers * (2 if name.startswith("t5") else 1)
    assert called["attention"] >= attentions or not full


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_beams_equal_transformers(name: str) -> None:
    plain, compiled = small_model(name), small_model(name)
    compiled.compile(backend=llmrt_backend, fullgraph=True)
    for kind in CACHES:
        options = {"max_new_tokens": 6, "num_beams": 3, "cache_implementation": kind}
        got, expected = (model.generate(**prompts(10), **options) for model in (compiled, plain))
        assert torch.equal(got, expected)
    assert counters["stats"]["unique_graphs"] >= 4


@pytest.mark.parametrize(
    ("name", "kind", "counts"),
    [
        ("llama", "static", (1, 2)),
        ("gpt_neox", "dynamic", (1, 2)),
        ("bloom", "dynamic", (1, 2)),
        ("gemma3", "static", (2, 4)),
    ],
)
def test_guards_per_layer(name: str, kind: str, counts: tuple[int, int]) -> None:
    found = []
    for layers in counts:
        torch._dynamo.reset()
        model = small_model(name, layers)
        compiled = torch.compile(model, backend=llmrt_backend, fullgraph=True)
        run = Decoding(model, kind, compiled, prompts(10))
        run(prompts(10)["input_ids"])
        run(prompts(10)["input_ids"][:, :1])
        found.append(guards(model))
    assert all(len(forms) == 2 for forms in found)
    assert max((b - a) / (counts[1] - counts[0]) for a, b in zip(*found, strict=True)) <= 140  # measured: 82 to 129
