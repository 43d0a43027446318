"""Graphs as functions: every kind of node and argument, constants by identity, memory freed at the last use."""

import operator
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from llmrt import ops
from llmrt.passes.executor import _SAME_ARGUMENTS, compile_graph

aten = torch.ops.aten
ROWS = torch.arange(12.0).reshape(3, 4)

FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "constants": lambda x: torch.where(x > 0, x, float("-inf")) + torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "dtypes": lambda x: (x.to(torch.bfloat16), x.double(), torch.zeros(2, dtype=torch.int32, device="cpu")),
    "parts": lambda x: [x.split([1, 3], -1)[1], x.chunk(2, -1)[0], x.unbind(0)[2]],
    "slices": lambda x: {"a": x[1:, :2], "b": x[:, -3:-1], "c": x[::2], "d": x[..., 1:99], "e": x[5:]},
    "views": lambda x: x.view(2, 6).t().reshape(3, 4).unsqueeze(1).expand(3, 2, 4).permute(2, 0, 1),
    "indices": lambda x: x[torch.tensor([2, 0])][:, [1, 1]],
    "functions": lambda x: nn.functional.gelu(nn.functional.silu(x), approximate="tanh") + x.softmax(-1).pow(2),
    "in place": lambda x: x.clone().add_(1).mul_(x),
    "operators": lambda x: ops.add_rms_norm(x, x, torch.ones(4), 1e-6),
    "reductions": lambda x: (x.mean(-1, keepdim=True), x.amax(0), x.max(1).indices),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
    "picked twice": lambda x: (lambda parts: (parts[0] + parts[0], parts[-1], parts))(list(torch.split(x, 2, 1))),
    "same input": lambda x: (x, x, x + 0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_the_graphs(name: str) -> None:
    gm = make_fx(FUNCTIONS[name], pre_dispatch=True)(ROWS)
    torch.testing.assert_close(compile_graph(gm)(ROWS), gm(ROWS), rtol=0, atol=0)


def test_graphs_of_modules_methods_and_attributes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.scale = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"out": self.inner(x).mul(self.scale) + y.size(0) // 2 - y.shape[1]}

    gm = symbolic_trace(Model())
    run = compile_graph(gm)
    torch.testing.assert_close(run(ROWS, ROWS), gm(ROWS, ROWS), rtol=0, atol=0)
    with torch.no_grad():
        gm.scale.zero_()
    torch.testing.assert_close(run(ROWS, ROWS)["out"], torch.full((3, 4), -3.0))


def test_names_do_not_collide() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    first = graph.call_function(aten.relu.default, (x,))
    first.name = "relu_0"  # what the function would be called
    second = graph.call_function(aten.relu.default, (first,))
    third = graph.call_function(operator.add, (second, first))
    graph.output((third,))
    run = compile_graph(GraphModule(nn.Module(), graph))
    assert torch.equal(run(-ROWS)[0], torch.zeros(3, 4))


class Alive(TorchDispatchMode):
    """Notes how many results live when each call starts."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Any] = []
        self.counts: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts.append(sum(r() is not None for r in self.results))
        out = func(*args, **(kwargs or {}))
        self.results += [weakref.ref(t) for t in (out if isinstance(out, tuple | list) else [out])]
        return out


def test_values_are_freed_after_their_last_use() -> None:
    def function(x: Tensor) -> Tensor:
        for _ in range(4):
            x = (x.sin() + x.cos()).split([2, 2])[0].repeat(2)
        return x

    gm = make_fx(function, pre_dispatch=True)(torch.randn(4))
    run = compile_graph(gm)
    x = torch.randn(4)
    with Alive() as alive:
        out = run(x)
    assert out.shape == (4,) and len(alive.counts) == 20
    assert max(alive.counts) == 2  # x and its sine while the cosine is made, both while they are added


def test_nothing_else_runs() -> None:
    gm = make_fx(lambda x, n: x.reshape(n, -1)[:, 1:3].transpose(0, 1) + 1, pre_dispatch=True)(ROWS, 3)
    source = compile_graph(gm).source  # type: ignore[attr-defined]
    calls = [line for line in source.splitlines() if "(" in line and "def " not in line]
    assert len(calls) == sum(node.op == "call_function" for node in gm.graph.nodes)


def test_quick_functions_have_the_schemas_arguments() -> None:
    assert len(_SAME_ARGUMENTS) > 40
    for overload, function in _SAME_ARGUMENTS.items():
        name = str(overload).split(".")[1]
        assert function.__name__ == name


def test_results_picked_in_other_ways() -> None:
    graph = Graph()
    parts = graph.call_function(aten.split.Tensor, (graph.placeholder("x"), 2, 1))
    parts.meta["val"] = list(ROWS.split(2, 1))
    first, last, again = (graph.call_function(operator.getitem, (parts, i)) for i in (0, -1, 0))
    graph.output((first, last, again))
    out = compile_graph(GraphModule(nn.Module(), graph))(ROWS)
    assert all(torch.equal(a, ROWS[:, b : b + 2]) for a, b in zip(out, (0, 2, 0), strict=True))
