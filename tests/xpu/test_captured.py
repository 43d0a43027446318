"""Graphs of whole models for a GPU that is not there: the operators of the CPU's graphs, over tensors of the GPU alone."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from elsewhere import Indexing, pretend
from torch import Tensor
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList

from llmrt import llm
from llmrt.llm import attention, deployment
from llmrt.llm.captured_forward import CapturedForward, learn_kinds
from llmrt.llm.greedy import GreedySearch

sys.path.insert(0, str(Path(__file__).parent.parent / "llm"))

from models import padded_batch, tiny_model

INT4 = llm.WeightOnlyQuantConfig(weight_dtype="int4", group_size=32)


def operators(graph: CapturedForward) -> list[str]:
    """The graph's operators that make tensors."""
    called = [n.target for n in graph.captured.module.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    return [op.name() for op in called if op is not torch.ops.aten.sym_size.int]


def devices_of(graph: CapturedForward) -> set[str]:
    flat, _ = torch.utils._pytree.tree_flatten([node.meta.get("val") for node in graph.captured.module.graph.nodes])
    return {str(value.device) for value in flat if isinstance(value, Tensor)}


@pytest.mark.parametrize("device", ["xpu:0", "cuda:0"])
@pytest.mark.parametrize(("family", "config"), [("llama", None), ("llama", INT4), ("gemma2", INT4), ("opt", INT4)])
def test_graphs_are_those_of_the_cpu(family: str, config: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded prompt, its steps, and steps of beams, which read the cache through the table."""
    model, calls = llm.optimize(tiny_model(family), quantization_config=config), []
    make = CapturedForward.__init__
    monkeypatch.setattr(CapturedForward, "__init__", lambda *args: calls.append(args[-1]) or make(*args))
    with torch.no_grad():
        for options in ({}, {"num_beams": 2}):
            model.generate(**padded_batch(), max_new_tokens=3, do_sample=False, **options)
    monkeypatch.undo()
    graphs = model.forward.graphs
    assert len(graphs) == len(calls) == 3
    pretend(monkeypatch, model, torch.device(device))
    with torch.no_grad(), Indexing():
        kinds = learn_kinds(model)
        assert kinds.device == torch.device(device)
        for call, graph in zip(calls, graphs, strict=True):
            there = CapturedForward(model, kinds, call)
            assert operators(there) == operators(graph)
            assert (devices_of(there), devices_of(graph)) == ({device}, {"cpu"})


@pytest.mark.parametrize("strict", [False, True])
def test_a_device_that_capturing_fails_on(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch cannot index tensors of this device, so the model's rotation cannot be captured."""
    model = llm.optimize(tiny_model("llama"), strict=strict)
    pretend(monkeypatch, model, torch.device("xpu:0"))
    ids = padded_batch()["input_ids"]
    said = r"the forward could not run as a graph \(RuntimeError: .*xpu"
    with torch.no_grad():
        if strict:
            with pytest.raises(RuntimeError, match=said):
                model(ids, past_key_values=llm.KVCache(model.config))
        else:
            with pytest.warns(UserWarning, match=said):
                out = model(ids, past_key_values=llm.KVCache(model.config))
            assert out.logits.shape[:2] == ids.shape and not model.forward.graphs
            assert "xpu" in model.optimization_report.graphs[0]


def test_tensors_on_another_device_run_the_modules() -> None:
    """The modules, not a graph, meet them and say what is wrong; graphs go on."""
    model = llm.optimize(tiny_model("llama"))
    ids = padded_batch()["input_ids"]

    def prepared(ids: Tensor, **options: Any) -> Any:
        return model.forward.prepared(model, ids, {"past_key_values": llm.KVCache(model.config), **options})

    with torch.no_grad():
        assert prepared(ids) is not None
        assert prepared(ids.to("meta")) is None
        assert prepared(ids, attention_mask=torch.ones_like(ids, device="meta")) is None
        assert prepared(ids, position_ids=torch.ones_like(ids, device="meta")) is None
        assert prepared(ids) is not None
    assert not model.forward.reasons and len(model.forward.graphs) == 1


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Whatever is read of tensors without values is 0; returns what was read as a number."""
    found: list[Tensor] = []
    for module in (deployment, attention):
        monkeypatch.setattr(module, "bool", lambda x: not isinstance(x, Tensor) and bool(x), raising=False)
    monkeypatch.setattr(deployment, "float", lambda x: found.append(x) or 0.0, raising=False)
    return found


def test_graphs_run_where_the_model_is(compared: list[Tensor]) -> None:
    """The meta device stands for a GPU. Every graph is compared with the modules in a trial run there, and greedy search of one row, which
    no token ends, waits for no value."""
    meta = torch.device("meta")
    model = llm.optimize(tiny_model("llama"), quantization_config=INT4, strict=True).to(meta)
    batch = {key: value.to(meta) for key, value in padded_batch().items()}
    one, tokens = batch["input_ids"][:1], torch.empty(3, 1, dtype=torch.int64, device=meta)
    cache = llm.KVCache(model.config)
    with torch.no_grad():
        out = model(**batch, past_key_values=cache)
        model(tokens, past_key_values=cache)
        cache.reorder_cache(tokens[:, 0])
        model(tokens, past_key_values=cache, position_ids=tokens)
        sequences = GreedySearch()(
            model,
            one,
            [],
            StoppingCriteriaList([MaxLengthCriteria(16)]),
            SimpleNamespace(**vars(model.generation_config), _pad_token_tensor=None),
            past_key_values=llm.KVCache(model.config),
            use_cache=True,
            attention_mask=torch.ones_like(one),
        )
    assert out.logits.device == sequences.device == meta and sequences.shape == (1, 16)
    assert [graph.partition(":")[0] for graph in model.optimization_report.graphs] == [
        "several tokens, several rows, padding, all logits",
        "one token, several rows",
        "one token, several rows, beams",
        "several tokens, one row, padding, all logits",
        "one token, one row, padding",
    ]
    assert len(compared) == 5 and all(value.is_meta for value in compared)
