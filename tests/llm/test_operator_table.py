"""One step in bfloat16, captured from untouched models: how exact it is, and that the table of operators says what the rewrites give."""

import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_models import CACHES, FAMILIES, LAYERS, NO_FULLGRAPH, Decoding, small_model
from models import padded_batch
from torch.fx.experimental.proxy_tensor import make_fx

ROOT = Path(__file__).parents[2]
#: Families whose prompt over a static cache is compared too: one of each way to write attention and positions.
STATIC_PROMPTS = ("llama", "gemma3", "gpt_neox", "bloom", "t5")


@pytest.fixture
def operator_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT))
    yield importlib.import_module("tests.operator_table")
    torch._dynamo.reset()


def test_views_and_integers_are_no_work(operator_table: Any) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        heads = x.view(x.shape[0], -1, 4).transpose(1, 2)
        return (heads @ heads.mT).softmax(-1).reshape(x.shape[0], -1)[:, 1:]

    graph = make_fx(function, pre_dispatch=True, tracing_mode="symbolic")(torch.rand(3, 8))
    counts = operator_table.calls(graph)
    assert counts["work"] == 2 and counts["view"] == 6
    assert sum(node.op == "call_function" for node in graph.graph.nodes) > 7  # sizes


def test_every_family_and_cache_has_a_row(operator_table: Any) -> None:
    rows = [line.split("|")[1:3] for line in operator_table.written().splitlines()[2:]]
    assert [(name.strip(), kind.strip()) for name, kind in rows] == [(n, k) for n in FAMILIES for k in CACHES]


def rms(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((logits - expected).square().mean() / expected.square().mean()).sqrt())


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_bfloat16_step_is_as_exact_as_transformers_and_its_row_is_written(
    name: str, kind: str, operator_table: Any
) -> None:
    """If the row is not: python -m tests.operator_table --write"""
    layers, batch, full = LAYERS.get(name, 1), padded_batch(2, 10), (name, kind) not in NO_FULLGRAPH
    model = small_model(name, layers, torch.bfloat16)
    exact = copy.deepcopy(model).float()
    graphs: list[Any] = []
    compiled = torch.compile(model, backend=operator_table.counting_rewritten(graphs), fullgraph=full)
    runs = {"exact": Decoding(exact, kind, exact, batch)}
    runs |= {"plain": Decoding(model, kind, model, batch), "compiled": Decoding(model, kind, model, batch)}
    prompt = operator_table.prompt_of(model, batch)
    prompt_too = kind == "dynamic" or name in STATIC_PROMPTS
    logits: dict[str, list[torch.Tensor]] = {key: [] for key in runs}
    for tokens in (prompt, torch.full((2, 1), 7)):
        if prompt_too or tokens is not prompt:
            runs["compiled"].run = compiled
        if tokens is not prompt:  # captured as if there had been no prompt, as `decode_calls` does
            torch._dynamo.reset()
            operator_table.mark_lengths(runs["compiled"], kind)
        for key, run in runs.items():
            logits[key].append(run(tokens)[:, -1].double())
    expected = torch.stack(logits.pop("exact"))
    noise = {key: rms(torch.stack(found), expected) for key, found in logits.items()}
    assert 0 < noise["plain"] < 8 * 2**-8
    assert noise["compiled"] <= 1.2 * noise["plain"]
    assert len(graphs) == 1 + prompt_too or not full
    row = operator_table.row(name, kind, {layers: graphs[-1]})
    assert f"| {' | '.join(row)} |" in operator_table.written().splitlines()
