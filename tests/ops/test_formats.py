"""Weight formats: quantization error bounds, code conversions, layout texts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrt.ops import FORMATS, Layout, dequantize, interleave_gate_up, quantize
from llmrt.ops.formats import join_codes, split_codes, split_gate_up

LAYOUTS = [
    Layout(name, asymmetric, group, torch.float32)
    for name in FORMATS
    for asymmetric in (False, True)
    for group in (32, 100, -1)
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_error_is_at_most_half_a_step(layout: Layout) -> None:
    torch.manual_seed(0)
    w = torch.randn(9, 230)
    codes, scales, zeros = quantize(w, layout)
    error = (dequantize(codes, scales, zeros, layout, 230) - w).abs()
    group = layout.geometry(230).group
    step = scales.repeat_interleave(group, 1)[:, :230]
    # Asymmetric: the zero is rounded too, so the ends of the range may be clamped by half a step more.
    assert (error <= step * (1.001 if layout.asymmetric else 0.501)).all()


def test_fullrange_uses_all_sixteen_codes() -> None:
    layout = Layout("int4", False, 32, torch.float32)
    w = torch.linspace(-1, 0.8, 32).view(1, -1)
    codes, scales, _ = quantize(w, layout, fullrange=True)
    assert split_codes(codes, 4, 32).min() == 0
    assert scales.item() == pytest.approx(1 / 8)


def test_group_of_zeros_stays_zero() -> None:
    for layout in LAYOUTS:
        codes, scales, zeros = quantize(torch.zeros(3, 64), layout)
        assert dequantize(codes, scales, zeros, layout, 64).abs().max() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused(value: float) -> None:
    w = torch.randn(4, 64)
    w[1, 2] = value
    with pytest.raises(RuntimeError, match="weight has NaN or infinite values"):
        quantize(w, Layout())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from([4, 8]))
def test_codes_survive_joining(n: int, k: int, bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    assert torch.equal(split_codes(join_codes(codes, bits), bits, k), codes)


@pytest.mark.parametrize("rows", [1, 16, 37])
def test_gate_and_up_survive_interleaving(rows: int) -> None:
    gate, up = torch.randn(rows, 5), torch.randn(rows, 5)
    again = split_gate_up(interleave_gate_up(gate, up), rows)
    assert torch.equal(again[0], gate) and torch.equal(again[1], up)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_text_round_trip(layout: Layout) -> None:
    assert Layout.parse(str(layout)) == layout


@pytest.mark.parametrize(
    "text", ["", "int4", "int5_sym_g32_bf16", "int4_sym_g4_bf16", "int4_sym_g32_f64", "int4_sym_g99999999_bf16"]
)
def test_bad_text_is_refused(text: str) -> None:
    with pytest.raises(RuntimeError, match=r"layout is|weight_dtype is|group_size is"):
        Layout.parse(text)


@pytest.mark.parametrize(
    ("field", "value"), [("weight_dtype", "int5"), ("group_size", 0), ("group_size", -2), ("scale_dtype", torch.int8)]
)
def test_bad_field_names_the_valid_values(field: str, value: object) -> None:
    with pytest.raises(RuntimeError, match=f"{field} is .*valid: "):
        Layout(**{field: value})
