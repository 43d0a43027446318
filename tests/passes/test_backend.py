"""The compile backend: same results, one graph, arguments checked; found by name without an import."""

import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from llmrt.passes import llmrt_backend

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def function(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x) @ x.T + 1


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_results_do_not_change(mode: str | None, dynamic: bool | None) -> None:
    compiled = torch.compile(function, backend=llmrt_backend, mode=mode, dynamic=dynamic, fullgraph=True)
    for size in (3, 5):
        x = torch.randn(size, 4)
        torch.testing.assert_close(compiled(x), function(x), rtol=1e-6, atol=1e-6)


def test_gradients_pass_through() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    torch.compile(function, backend=llmrt_backend)(x).sum().backward()
    expected = torch.autograd.grad(function(x).sum(), x)[0]
    assert torch.allclose(x.grad, expected)


def test_an_operator_stays_one_node() -> None:
    graphs = []

    def spy(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(gm)
        return llmrt_backend(gm, inputs)

    x, w = torch.randn(3, 8), torch.rand(8)
    compiled = torch.compile(lambda x: torch.ops.llmrt.rms_norm(x, w, 1e-6) + x, backend=spy, fullgraph=True)
    assert torch.equal(compiled(x), torch.ops.llmrt.rms_norm(x, w, 1e-6) + x)
    calls = [node for node in graphs[0].graph.nodes if "llmrt" in str(node.target)]
    assert len(graphs) == 1 and len(calls) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"mode": "fastest"}, "mode='fastest'"), ({"options": {"unroll": 4}}, r"options=\['unroll'\]: unknown")],
)
def test_unknown_arguments_raise(arguments: dict[str, object], message: str) -> None:
    graph = torch.fx.symbolic_trace(function)
    with pytest.raises(ValueError, match=message):
        llmrt_backend(graph, [torch.randn(2, 2)], **arguments)  # type: ignore[arg-type]


def test_entry_points_name_what_exists() -> None:
    targets = re.findall(r'^llmrt = "([\w.]+):(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(targets) == 2
    for module, name in targets:
        assert callable(getattr(import_module(module), name))


@pytest.mark.skipif(
    "llmrt" not in entry_points(group="torch_dynamo_backends").names, reason="llmrt is not installed, only importable"
)
def test_found_by_name_without_an_import() -> None:
    code = """if True:
        import sys, torch
        assert "llmrt" not in sys.modules
        compiled = torch.compile(lambda x: x.sin() + 1, backend="llmrt")
        x = torch.randn(4)
        assert torch.equal(compiled(x), x.sin() + 1)
        assert "llmrt.passes.backend" in sys.modules and "transformers" not in sys.modules
    """
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
