"""Capturing: symbolic sizes stay symbolic, guards say what a graph is valid for, the caller's modes do not matter."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import TorchDispatchMode

from llmrt import ops
from llmrt.passes.capture import Capture
from llmrt.passes.executor import compile_graph


def targets(captured: Any) -> list[str]:
    return [str(node.target) for node in captured.module.graph.nodes if node.op == "call_function"]


def test_operators_stay_whole_and_sizes_symbolic() -> None:
    weight, scale = nn.Parameter(torch.randn(8, 8)), torch.rand(8)

    def function(x: Tensor, length: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            y = nn.functional.linear(ops.rms_norm(x, scale, 1e-6), weight)
        positions = torch.arange(x.shape[1]) + length
        return {"y": y.unflatten(-1, (2, 4)).flatten(0, 1), "positions": positions}

    capture = Capture()
    x = capture.tensor((capture.size("batch", 3, 2), capture.size("tokens", 5, 2), 8), torch.float32, "cpu")
    captured = capture.trace(function, [x, capture.size("length", 0)])
    assert captured.sizes == ("batch", "tokens", "length") and captured.guards() == []
    assert {"llmrt.rms_norm.default", "aten.linear.default"} <= set(targets(captured))
    assert not [t for t in targets(captured) if "grad" in t]
    kinds = [node.op for node in captured.module.graph.nodes]
    assert kinds.index("call_function") == kinds.count("placeholder") + kinds.count("get_attr")
    run, fits = compile_graph(captured.module), captured.condition()
    for batch, tokens, length in ((3, 5, 0), (2, 9, 4), (7, 2, 1)):
        assert fits(batch=batch, tokens=tokens, length=length)
        real = torch.randn(batch, tokens, 8)
        torch.testing.assert_close(run(real, length), function(real, length), rtol=0, atol=0)
    with torch.no_grad():
        weight.zero_()
    assert not run(real, 0)["y"].any()  # parameters are the objects themselves


def test_equal_sizes_are_not_taken_for_the_same() -> None:
    capture = Capture()
    a, b = (capture.tensor((capture.size(name, 4, 2), 3), torch.float32, "cpu") for name in "ab")
    run = compile_graph(capture.trace(lambda a, b: torch.cat((a, b)).sum(1), [a, b]).module)
    assert run(torch.ones(2, 3), torch.ones(5, 3)).shape == (7,)


def test_decisions_become_guards() -> None:
    def function(x: Tensor, length: Any) -> Tensor:
        return x * 2 if length + x.shape[0] > 10 else x + 1

    for length, others, condition in ((3, (0, 6), "<="), (20, (7, 100), ">")):
        capture = Capture()
        x = capture.tensor((capture.size("tokens", 4, 2),), torch.float32, "cpu")
        captured = capture.trace(function, [x, capture.size("length", length)])
        fits = captured.condition(("unused", "length", "tokens"))
        assert len(captured.guards()) == 1
        assert all(fits(0, n, 4) for n in (length, *others))
        assert not fits(0, 7 if condition == "<=" else 6, 4)


def test_a_size_that_was_read_as_a_number_is_guarded() -> None:
    capture = Capture()
    x = capture.tensor((capture.size("tokens", 6, 2),), torch.float32, "cpu")
    captured = capture.trace(lambda x: x.view(2, int(x.shape[0]) // 2), [x])
    assert captured.condition()(6) and not captured.condition()(8)


def test_what_looks_at_values_raises() -> None:
    capture = Capture()
    with pytest.raises(GuardOnDataDependentSymNode):
        capture.trace(lambda x: x + 1 if x.sum() > 0 else x, [capture.tensor((3,), torch.float32, "cpu")])


class Count(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_the_callers_modes_do_not_show() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    with Count() as count, torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        capture = Capture()
        x = capture.tensor((capture.size("rows", 3, 2), 4), torch.float32, "cpu")
        captured = capture.trace(lambda x: nn.functional.linear(x, weight), [x])
    assert count.calls == 0 and targets(captured) == ["aten.linear.default"]
    assert captured.module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0].meta[
        "val"
    ].dtype == (torch.float32)


def test_writes_to_inputs_are_kept() -> None:
    def function(cache: Tensor, key: Tensor, position: Any) -> Tensor:
        ops.kv_append(cache, cache, key, key, position)
        return key + 1

    capture = Capture()
    cache = capture.tensor((2, 1, capture.size("capacity", 9), 4), torch.float32, "cpu")
    inputs = [cache, capture.tensor((2, 1, 1, 4), torch.float32, "cpu"), capture.size("position", 3)]
    run = compile_graph(capture.trace(function, inputs).module)
    real, key = torch.zeros(2, 1, 6, 4), torch.randn(2, 1, 1, 4)
    run(real, key, 5)
    assert torch.equal(real[:, :, 5], key[:, 0]) and not real[:, :, :5].any()
