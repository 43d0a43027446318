"""The table of operators per decoder layer says what the rewrites give."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_models import CACHES, FAMILIES
from torch.fx.experimental.proxy_tensor import make_fx

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_row_is_what_the_rewrites_give(name: str, kind: str, operator_table: Any) -> None:
    """If not: python -m tests.operator_table --write"""
    assert f"| {' | '.join(operator_table.row(name, kind))} |" in operator_table.written().splitlines()
