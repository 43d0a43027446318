"""Constants of parameters: folded when that costs no memory, never stale, never shared with a caller."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrt.passes import RewriteReport, llmrt_backend
from llmrt.passes.folding import FOLDING

NAME = FOLDING[0].name


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Module(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Any], shape: tuple[int, ...] = (8,)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.register_buffer("count", torch.zeros(8))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def compiled(module: nn.Module, codegen: str = "eager") -> tuple[Any, list[RewriteReport]]:
    reports: list[RewriteReport] = []
    options = {"report": reports, "strict": True, "codegen": codegen}
    return torch.compile(module, backend=llmrt_backend, fullgraph=True, options=options), reports


def _offset(m: Any, x: Tensor) -> Tensor:
    return x * (1 + m.weight.float())


def _count(m: Any, x: Tensor) -> Tensor:
    m.count.add_(1)
    return x * m.count.exp()


FOLDED: dict[str, tuple[Callable[[Any, Tensor], Any], tuple[int, ...], int]] = {
    "offset": (_offset, (8,), 1),
    "two uses": (lambda m, x: (x * m.weight.exp(), x + m.weight.exp()), (8,), 2),
    "one follows from the other": (lambda m, x: [x * e + e.sin() for e in [m.weight.exp()]], (8,), 2),
    "cast": (lambda m, x: x * m.weight.bfloat16()[0], (300, 8), 1),
    "factory": (lambda m, x: x * torch.arange(8), (8,), 1),
    "a view only": (lambda m, x: x * m.weight.view(2, 4).flatten(), (8,), 0),
    "larger than its source": (lambda m, x: x.sum() * m.weight.exp().expand(400, 400).double(), (400,), 0),
    "returned": (lambda m, x: (x + 1, m.weight.exp()), (8,), 0),
    "returned as a view": (lambda m, x: (x + 1, m.weight.exp().view(2, 4)), (8,), 0),
    "written to": (_count, (8,), 0),
    "random": (lambda m, x: x * torch.rand_like(m.weight), (8,), 0),
    "size of x": (lambda m, x: x * m.weight.exp() + torch.zeros(x.shape[0], 1), (8,), 2),
}


@pytest.mark.parametrize(
    ("case", "codegen"),
    [*((case, "eager") for case in FOLDED), ("two uses", "inductor"), ("written to", "inductor")],
)
def test_folds(case: str, codegen: str) -> None:
    function, shape, times = FOLDED[case]
    module, x = Module(function, shape), torch.randn(3, 8)
    result, reports = compiled(module, codegen)
    with torch.no_grad():
        for _ in range(2):
            torch.manual_seed(1)
            count = module.count.clone()
            expected = module(x)
            module.count.copy_(count)
            torch.manual_seed(1)
            torch.testing.assert_close(result(x), expected)
    assert len(reports) == 1 and reports[0].fired[NAME] == times


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_changes_are_seen(codegen: str, mode: Any) -> None:
    module, x, other = Module(_offset), torch.randn(3, 8), nn.Parameter(torch.randn(8))
    function, reports = compiled(module, codegen)
    with mode():
        torch.testing.assert_close(function(x), module(x))
        module.weight.mul_(3)
        torch.testing.assert_close(function(x), module(x))
        module.weight = other
        torch.testing.assert_close(function(x), module(x))
    with torch.no_grad():
        module.weight.add_(1)
        torch.testing.assert_close(function(x), module(x))
    assert all(report.fired[NAME] == 1 for report in reports)


def test_weights_whose_changes_torch_does_not_count_are_left_alone() -> None:
    with torch.inference_mode():
        module, x = Module(_offset), torch.randn(3, 8)
        function, reports = compiled(module)
        torch.testing.assert_close(function(x), module(x))
        module.weight.mul_(3)
        torch.testing.assert_close(function(x), module(x))
    assert reports[0].fired[NAME] == 0


def test_an_ordinary_weight_replaced_by_such_a_one() -> None:
    module, x = Module(_offset), torch.randn(3, 8)
    module.requires_grad_(False)
    function, _ = compiled(module)
    with torch.inference_mode():
        function(x)
        module.weight = nn.Parameter(torch.randn(8), requires_grad=False)
        for _ in range(2):
            torch.testing.assert_close(function(x), module(x))
            module.weight.mul_(3)


def test_two_modules_one_graph() -> None:
    modules, x = [Module(_offset) for _ in range(3)], torch.randn(3, 8)

    @torch.compile(backend=llmrt_backend)
    def run(module: Module, x: Tensor) -> Tensor:
        return module(x)

    with torch.no_grad():
        for module in modules * 2:
            torch.testing.assert_close(run(module, x), module(x))


def test_the_graph_keeps_no_module_alive() -> None:
    module, x = Module(_offset), torch.randn(3, 8)
    function, _ = compiled(module)
    with torch.no_grad():
        function(x)
    weight = weakref.ref(module.weight)
    del module, function
    gc.collect()
    assert weight() is None
