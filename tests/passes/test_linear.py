"""Dequantize + matmul: every way of packing fires exactly once, equals the exact product, and follows its parameters."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantized import Awq, Gptq, Int8
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llmrt.passes import RewriteReport, llmrt_backend, rewrite
from llmrt.passes.linear import NAME, QUANTIZED
from llmrt.passes.retrace import trace

K, N, GROUP = 96, 40, 32
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
WAYS: dict[str, Callable[[torch.dtype], Any]] = {
    "gptq, zeros minus one": lambda dtype: Gptq(K, N, GROUP, dtype, version=1),
    "gptq, zeros as they are": lambda dtype: Gptq(K, N, GROUP, dtype),
    "gptq, symmetric": lambda dtype: Gptq(K, N, GROUP, dtype, symmetric=True),
    "gptq, grouped": lambda dtype: Gptq(K, N, GROUP, dtype, grouped=True),
    "gptq, grouped, zeros minus one": lambda dtype: Gptq(K, N, GROUP, dtype, version=1, grouped=True),
    "gptq, act-order": lambda dtype: Gptq(K, N, GROUP, dtype, act_order=True),
    "gptq, one group": lambda dtype: Gptq(K, N, K, dtype, act_order=True),
    "gptq, 8 bits": lambda dtype: Gptq(K, N, GROUP, dtype, bits=8),
    "gptq, 8 bits, zeros minus one": lambda dtype: Gptq(K, N, GROUP, dtype, bits=8, version=1),
    "awq": lambda dtype: Awq(K, N, GROUP, dtype),
    "int8, scaled weight": lambda dtype: Int8(K, 37, dtype),
    "int8, scaled output": lambda dtype: Int8(K, 37, dtype, after=True),
}


pytestmark = pytest.mark.usefixtures("fresh_dynamo", "without_gradients")


def graph_of(module: Callable[[Tensor], Any], x: Tensor) -> torch.fx.GraphModule:
    """Return a module's graph with its tensors as constants."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return trace(module, [mode.from_tensor(x, static_shapes=True)], mode)


def calls(gm: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def exact(module: Any, x: Tensor) -> Tensor:
    return x.double() @ module.weight() + module.bias.double()


def assert_near(result: Tensor, module: Any, x: Tensor) -> None:
    expected = exact(module, x)
    assert result.dtype == x.dtype and result.shape == expected.shape
    assert (result.double() - expected).abs().max() <= TOLERANCE[x.dtype] * expected.abs().max()


def compiled(module: Any, **options: Any) -> tuple[Any, list[RewriteReport]]:
    reports: list[RewriteReport] = []
    options = {"strict": True, "report": reports, **options}
    return torch.compile(module, backend=llmrt_backend, fullgraph=True, options=options), reports


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("way", WAYS)
def test_fires_once_and_is_exact(way: str, dtype: torch.dtype) -> None:
    module = WAYS[way](dtype)
    x = torch.randn(2, 3, K, dtype=dtype)
    gm = graph_of(module, x)
    report = rewrite(gm, QUANTIZED, strict=True)
    assert report.fired[NAME] == 1 and not report.near_misses
    left = {"llmrt.quant_linear.default", "aten.reshape.default", "aten.index_select.default"}
    assert calls(gm).count("llmrt.quant_linear.default") == 1 and set(calls(gm)) <= left
    assert ("aten.index_select.default" in calls(gm)) == (way == "gptq, act-order")
    assert_near(gm(x), module, x)


@pytest.mark.parametrize(
    ("way", "layout"),
    [
        ("gptq, zeros as they are", "int4_asym_g32_f16"), ("gptq, symmetric", "int4_sym_g32_f16"),
        ("gptq, 8 bits", "int8_asym_g32_f16"), ("gptq, one group", "int4_asym_channel_f16"),
        ("int8, scaled output", "int8_sym_channel_f16"),
    ],
)  # fmt: skip
def test_layout(way: str, layout: str) -> None:
    gm = graph_of(WAYS[way](torch.float16), torch.randn(3, K, dtype=torch.float16))
    rewrite(gm, QUANTIZED, strict=True)
    (call,) = gm.graph.find_nodes(op="call_function", target=torch.ops.llmrt.quant_linear.default)
    assert call.args[4] == layout


class Two(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Any], layer: Any) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer, x)


def _int8(layer: Any) -> Tensor:
    return layer.codes.to(torch.float32) * layer.scales.unsqueeze(1)


def test_one_weight_of_two_products_is_packed_once() -> None:
    layer = Int8(K, K, torch.float32)

    def both(layer: Any, x: Tensor) -> Tensor:
        weight = _int8(layer)
        return torch.nn.functional.linear(torch.nn.functional.linear(x, weight).relu(), weight)

    gm = graph_of(Two(both, layer), torch.randn(3, K))
    assert rewrite(gm, QUANTIZED, strict=True).fired[NAME] == 2
    assert len([node for node in gm.graph.nodes if node.op == "get_attr"]) == 1


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def _irregular() -> Any:
    layer = Gptq(K, N, GROUP, torch.float32)
    layer.g_idx[0] = 1
    return layer


def _column(layer: Any) -> Tensor:
    return layer.scales.unsqueeze(1)


USED = "uses the weight or its codes as well"
NEAR_MISSES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "weight used elsewhere": (lambda m, x: (lambda w: (_linear(x, w), w.sum(0)))(_int8(m)), f"aten.sum.* {USED}"),
    "x depends on the weight": (lambda m, x: (lambda w: _linear(x + w[0], w))(_int8(m)), USED),
    "weight is x as well": (lambda m, x: (lambda w: (_linear(w, w), x + 1))(_int8(m)), "the activations are constant"),
    "constant activations": (lambda m, x: _linear(m.scales.expand(1, -1) @ _int8(m), _int8(m)) + x.sum(), "constant"),
    "codes out of range": (lambda m, x: _linear(x, (m.codes.int() * 3).float() * _column(m)), "codes out of range"),
    "fractions": (lambda m, x: _linear(x, (m.codes.float() - 0.5) * _column(m)), "the codes are not integers"),
    "float codes": (lambda m, x: _linear(x, m.floats * _column(m)), "no factor of the weight has integer codes"),
    "a scale per element": (lambda m, x: _linear(x, m.codes.float() * m.floats), "change within groups of 8 inputs"),
    "no scale": (lambda m, x: _linear(x, m.codes.float()), "the output is not scaled"),
    "infinite scale": (lambda m, x: _linear(x, m.codes.float() * (_column(m) / 0)), "infinite"),
    "float64": (lambda m, x: _linear(x.double(), m.codes.double() * _column(m)), "activations are torch.float64"),
    "irregular groups": (lambda m, x: m.irregular(x), "change within groups of 8 inputs, in any order"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss(case: str) -> None:
    function, reason = NEAR_MISSES[case]
    layer = Int8(K, 37, torch.float32)
    layer.irregular = _irregular()
    layer.floats = nn.Parameter(torch.randn(37, K).round(decimals=1))
    module, x = Two(function, layer), torch.randn(3, K)
    gm = graph_of(module, x)
    report = rewrite(gm, QUANTIZED, strict=True)
    assert report.fired[NAME] == 0 and not any("llmrt" in call for call in calls(gm))
    assert re.search(reason, report.near_misses[0].reason)
    assert report.near_misses[0].rewrite == NAME and NAME in str(report)
    torch.testing.assert_close(gm(x), module(x), equal_nan=True)


def test_a_plain_weight_is_no_near_miss() -> None:
    gm = graph_of(nn.Linear(K, N).to(torch.bfloat16).float(), torch.randn(3, K))
    report = rewrite(gm, QUANTIZED, strict=True)
    assert report.fired[NAME] == 0 and not report.near_misses
    assert calls(gm) == ["aten.linear.default"]


def test_a_zero_of_16_takes_a_wider_format() -> None:
    module = Gptq(K, N, GROUP, torch.float32, version=1)
    module.qzeros.fill_(-1)  # 15 everywhere, and 1 is added
    module.zeros.fill_(16)
    module.codes[0] = 0
    module.qweight.bitwise_and_(~15)
    gm = graph_of(module, torch.randn(3, K))
    assert rewrite(gm, QUANTIZED, strict=True).fired[NAME] == 1
    (call,) = gm.graph.find_nodes(op="call_function", target=torch.ops.llmrt.quant_linear.default)
    assert call.args[4] == "int8_sym_g32_f32"


COMPILED = ("gptq, zeros minus one", "gptq, grouped", "gptq, act-order", "awq", "int8, scaled weight")


@pytest.mark.parametrize(
    ("way", "codegen"), [*((way, "eager") for way in COMPILED), ("gptq, act-order", "inductor"), ("awq", "inductor")]
)
def test_compiled(way: str, codegen: str) -> None:
    module = WAYS[way](torch.bfloat16)
    function, reports = compiled(module, codegen=codegen)
    for batch in (2, 5, 7):
        x = torch.randn(batch, 3, K, dtype=torch.bfloat16)
        assert_near(function(x), module, x)
    assert len(reports) == 2 and all(r.fired[NAME] == 1 for r in reports)  # one batch, any batch


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_changes_are_seen(codegen: str) -> None:
    module, x = Gptq(K, N, GROUP, torch.float32, act_order=True), torch.randn(4, K)
    function, reports = compiled(module, codegen=codegen)
    assert_near(function(x), module, x)
    module.scales.mul_(2)
    assert_near(function(x), module, x)
    module.scales = torch.rand_like(module.scales)
    assert_near(function(x), module, x)
    module.load_state_dict({**module.state_dict(), "g_idx": module.g_idx.flip(0), "bias": torch.randn(N)})
    assert_near(function(x), module, x)
    module.scales.data = module.scales.data + 1
    assert_near(function(x), module, x)
    assert len(reports) == 1


def test_a_change_that_does_not_fit_runs_the_captured_graph() -> None:
    module, x = Gptq(K, N, GROUP, torch.float32, symmetric=True), torch.randn(4, K)
    function, reports = compiled(module)
    assert_near(function(x), module, x)
    module.g_idx[0] = 1
    with pytest.warns(UserWarning, match="a changed weight needs another graph"):
        result = function(x)
    assert_near(result, module, x)
    assert_near(function(x), module, x)
    module.g_idx[0] = 0
    assert_near(function(x), module, x)
    assert len(reports) == 1


def test_layers_that_share_compiled_code_keep_their_own_weights() -> None:
    layers = [Gptq(K, K, GROUP, torch.float32) for _ in range(3)]
    reports: list[RewriteReport] = []
    for layer in layers:
        layer.compile(backend=llmrt_backend, options={"report": reports})
    for _ in range(2):
        for layer in layers:
            x = torch.randn(4, K)
            assert_near(layer(x), layer, x)
    assert len(reports) <= len(layers)
