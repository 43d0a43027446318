"""Every Triton kernel equals its operator's reference in float64; what is refused is refused with a reason."""

import pytest
import torch
from comparing import compare_with_double
from covering import covering, every_sample

from llmrt import ops, xpu
from llmrt.ops import OPERATORS, Layout
from llmrt.xpu.route import ROUTES, import_routes

import_routes()
SERVED = sorted(operator for operator, kind in ROUTES if kind == "triton")
#: Interpreted, a sample of these takes a tenth of a second and more; a GPU runs all of them.
SLOW = {"attention", "kv_append", "quant_experts", "quant_linear", "rope", "rope_append", "static_linear"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where the interpreter divides by 0 and rounds NaN
@pytest.mark.parametrize("name", SERVED)
def test_equals_reference_in_double(name: str, device: str, kernels: xpu.Installed) -> None:
    op = OPERATORS[name]
    samples = covering(op) if device == "cpu" and name in SLOW else every_sample(op)
    for sample in samples:
        compare_with_double(op, sample, device)
    assert kernels.calls == {(name, "triton"): len(samples)}


def test_every_operator_that_triton_shall_serve_has_a_kernel() -> None:
    shall = {row.operator for row in xpu.TABLE if row.kind == "triton"}
    assert set(SERVED) == shall


@pytest.mark.parametrize("name", SERVED)
def test_no_sample_is_refused_but_double(name: str) -> None:
    refuses = ROUTES[name, "triton"].refuses
    for sample in every_sample(OPERATORS[name]):
        assert refuses(*sample.args, **sample.kwargs) is None, sample.name
        double = sample.double()
        assert "float64" in refuses(*double.args, **double.kwargs), sample.name


def test_refusals_say_why() -> None:
    weight = torch.empty(32769)
    assert "32769 elements" in ROUTES["rms_norm", "triton"].refuses(torch.empty(1, 32769), weight, 1e-5)
    wide = torch.empty(1, 1, 1, 257)
    assert "257 elements" in ROUTES["attention", "triton"].refuses(wide, wide, wide, 1, 1.0)
    codes = torch.empty(1, 1, 4225, dtype=torch.uint8)[..., 1:]
    args = (torch.empty(1, 128), codes, None, None, "int8_sym_g128_bf16", 32)
    assert "multiple of 4 bytes" in ROUTES["quant_linear", "triton"].refuses(*args)


def test_bad_arguments_raise_what_the_reference_raises(kernels: xpu.Installed) -> None:
    x, cache = torch.randn(2, 3, 2, 8), torch.zeros(2, 2, 4, 8)
    cos = torch.randn(5, 4)
    positions = torch.tensor([[0, 1, 5]])
    calls = (
        (ops.rms_norm, (x, torch.ones(7), 1e-5)),
        (ops.silu_mul, (x, x[..., :4])),
        (ops.rope, (x, x, cos, cos, positions)),
        (ops.kv_append, (cache, cache, x, x, 2)),
        (ops.kv_append, (cache, cache, x, x, 0, 1, torch.tensor([0, 4, 1]))),
        (ops.attention, (x, cache, cache, 5, 1.0)),
        (ops.attention, (x, cache, cache, 4, 1.0, True, 0, 0.0, torch.ones(2, 3, dtype=torch.bool))),
        (ops.attention, (x, cache, cache, 4, 1.0, True, 0, 0.0, None, torch.ones(3))),
        (ops.quant_linear, (x, torch.empty(1, 1, 64, dtype=torch.uint8), None, None, str(Layout()), 8)),
        (ops.argmax, (x[..., :0],)),
    )
    for op, args in calls:
        with pytest.raises(RuntimeError) as expected:
            op.reference(*args)
        with pytest.raises(RuntimeError) as raised:
            op(*args)
        assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("compute", ["int8", "bf16"])
@pytest.mark.parametrize("rows", [1, 3])
def test_nan_and_infinity_reach_the_output(rows: int, compute: str, device: str, kernels: xpu.Installed) -> None:
    layout = Layout()
    weight = ops.pack_weight.reference(*ops.quantize(torch.randn(32, 256), layout), str(layout), 256).to(device)
    for bad in (float("nan"), float("inf")):
        x = torch.randn(rows, 256, device=device)
        x[0, 5] = bad
        y = ops.quant_linear(x, weight, None, None, str(layout), 32, compute)
        assert not y[0].isfinite().all() and y[1:].isfinite().all()
        assert not torch.isnan(x[0, 5]) or y[0].isnan().all()
