"""Weight formats: quantization error bounds, code conversions, layout texts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrt.ops import FORMATS, Layout, dequantize, interleave_gate_up, quantize
from llmrt.ops.formats import Format, join_codes, split_codes, split_gate_up

LAYOUTS = [
    Layout(name, asymmetric, group, torch.float32)
    for name, row in FORMATS.items()
    for asymmetric in ((False, True) if row.integer else (False,))
    for group in (32, 100, -1)
]
FLOATS = [row for row in FORMATS.values() if row.dtype is not None]
BOOKS = [row for row in FORMATS.values() if row.book]


@pytest.mark.parametrize("layout", [form for form in LAYOUTS if form.format.integer], ids=str)
def test_error_is_at_most_half_a_step(layout: Layout) -> None:
    torch.manual_seed(0)
    w = torch.randn(9, 230)
    codes, scales, zeros = quantize(w, layout)
    error = (dequantize(codes, scales, zeros, layout, 230) - w).abs()
    group = layout.geometry(230).group
    step = scales.repeat_interleave(group, 1)[:, :230]
    # Asymmetric: the zero is rounded too, so the ends of the range may be clamped by half a step more.
    assert (error <= step * (1.001 if layout.asymmetric else 0.501)).all()


def all_values(layout: Layout) -> torch.Tensor:
    """Return the value of every code."""
    codes = join_codes(torch.arange(layout.format.levels + 1, dtype=torch.uint8).view(1, -1), layout.format.bits)
    return dequantize(codes, torch.ones(1, 1), None, Layout(layout.weight_dtype, False, -1), layout.format.levels + 1)[
        0
    ]


@pytest.mark.parametrize("layout", [form for form in LAYOUTS if not form.format.integer], ids=str)
def test_every_value_becomes_the_nearest_of_its_format(layout: Layout) -> None:
    w = torch.randn(9, 230) * torch.logspace(-3, 3, 9).unsqueeze(1)
    codes, scales, zeros = quantize(w, layout)
    values = all_values(layout)
    values = values[values.isfinite()].double()
    group = layout.geometry(230).group
    steps = scales.double().repeat_interleave(group, 1)[:, :230]
    nearest = (w.double().unsqueeze(-1) / steps.unsqueeze(-1) - values).abs().amin(-1) * steps
    error = (dequantize(codes, scales.double(), zeros, layout, 230) - w.double()).abs()
    torch.testing.assert_close(error, nearest, rtol=0, atol=float(3e-7 * w.abs().max()))
    largest = torch.nn.functional.pad(w.abs(), (0, -230 % group)).view(9, -1, group).amax(-1)
    torch.testing.assert_close(scales * layout.format.absmax, largest)


@pytest.mark.parametrize("row", FLOATS, ids=lambda row: row.name)
def test_floats_of_8_bits_survive(row: Format) -> None:
    """Every finite code, subnormal ones and -0 among them, comes back from its own value."""
    layout = Layout(row.name, False, -1, torch.float32)
    codes = torch.arange(256, dtype=torch.uint8).view(1, -1)
    values = codes.view(row.dtype).float()
    codes = codes[values.isfinite()].view(1, -1)
    weight = dequantize(codes, torch.full((1, 1), 0.25), None, layout, codes.shape[1])
    again, scales, _ = quantize(weight, layout)
    assert scales.item() == 0.25 and torch.equal(again, codes)


def test_books_are_those_of_their_sources() -> None:
    """fp4_e2m1 by its bits; nf4 by the property that defines it: quantiles of both halves, an exact 0 and both ends."""
    c = torch.arange(16)
    exponent, mantissa = (c >> 1 & 3).double(), (c & 1).double()
    magnitude = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2 ** (exponent - 1))
    assert torch.equal(FORMATS["fp4_e2m1"].values().double(), torch.where(c >= 8, -magnitude, magnitude))
    normal, offset = torch.distributions.Normal(0.0, 1.0), (1 - 1 / 32 + 1 - 1 / 30) / 2
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    book = torch.cat((negative, torch.zeros(1), positive)).sort().values / positive.max()
    torch.testing.assert_close(FORMATS["nf4"].values().double(), book, rtol=0, atol=1e-6)


@pytest.mark.parametrize("row", BOOKS, ids=lambda row: row.name)
def test_books_of_other_computes_are_near(row: Format) -> None:
    exact = row.values()
    for compute, error in (("fp16", 0.0), ("bf16", 2**-9), ("int8", 0.5 / 127)):
        assert (row.values(compute) - exact).abs().max() <= (0 if row.name == "fp4_e2m1" else error)
    assert (row.values("int8") * row.digits).abs().max() <= 127


@pytest.mark.parametrize("row", FLOATS, ids=lambda row: row.name)
def test_powers_of_two_as_scales(row: Format) -> None:
    layout = Layout(row.name, False, 8, torch.float8_e8m0fnu)
    weight = torch.randn(6, 40) * torch.tensor([1e-30, 1e-5, 1.0, 448.0, 1e30, 0.0]).unsqueeze(1)
    codes, scales, _ = quantize(weight, layout)
    largest = weight.abs().view(6, 5, 8).amax(-1)
    exact = largest.double() / row.absmax
    assert (scales.double() >= exact).all(), "nothing saturates"
    assert (scales.double()[:5] < 2 * exact[:5]).all() and (scales.double()[5] == 2.0**-127).all()
    error = (dequantize(codes, scales, None, layout, 40) - weight).abs().view(6, 5, 8).amax(-1)
    assert (error <= largest * (2**-4 if row.name == "fp8_e4m3" else 2**-3)).all()


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
    "text",
    [
        "",
        "int4",
        "int5_sym_g32_bf16",
        "int4_sym_g4_bf16",
        "int4_sym_g32_f64",
        "int4_sym_g99999999_bf16",
        "nf4_asym_g32_bf16",
        "int4_sym_g32_e8m0",
    ],
)
def test_bad_text_is_refused(text: str) -> None:
    with pytest.raises(RuntimeError, match=r"layout is|weight_dtype is|group_size is|asymmetric is|scale_dtype is"):
        Layout.parse(text)


@pytest.mark.parametrize(
    ("field", "value"), [("weight_dtype", "int5"), ("group_size", 0), ("group_size", -2), ("scale_dtype", torch.int8)]
)
def test_bad_field_names_the_valid_values(field: str, value: object) -> None:
    with pytest.raises(RuntimeError, match=f"{field} is .*valid: "):
        Layout(**{field: value})
