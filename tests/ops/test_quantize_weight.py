import pytest
import torch

from llmrt import ops
from llmrt.ops.formats import FORMATS, Format, Layout
from llmrt.ops.quantize_weight import quantize_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_reference(dtype: torch.dtype, isa: str) -> None:
    for sample in quantize_weight.sample_inputs(dtype):
        expected, actual = quantize_weight.reference(*sample.args), quantize_weight(*sample.args)
        for name, a, e in zip(("codes", "scales", "zeros"), actual, expected, strict=True):
            assert a.dtype == e.dtype and a.shape == e.shape, f"{sample.name}: {name}"
            assert torch.equal(a.view(torch.uint8), e.contiguous().view(torch.uint8)), f"{sample.name}: {name}"


def test_many_rows(isa: str) -> None:
    weight = torch.randn(1000, 257).bfloat16()
    for layout in (Layout("int4", True, 64), Layout("int8", False, -1, torch.float32), Layout("nf4", False, 64)):
        expected = ops.quantize(weight, layout)
        codes, scales, zeros = ops.quantize_weight(weight, str(layout))
        assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])
        assert torch.equal(zeros, expected[2]) if layout.asymmetric else zeros.shape == (1000, 0)


@pytest.mark.parametrize("row", [row for row in FORMATS.values() if not row.integer], ids=lambda row: row.name)
def test_every_rounding(row: Format, isa: str) -> None:
    """Values at, just below and just above every number of the format and every midpoint, with a scale of 1."""
    layout = Layout(row.name, False, -1, torch.float32)
    values = torch.tensor(row.book) if row.book else torch.arange(256, dtype=torch.uint8).view(row.dtype).float()
    values = values[values.isfinite()].sort().values
    values = torch.cat((values, (values[1:] + values[:-1]) / 2))
    infinity = torch.tensor(float("inf"))
    weight = torch.cat((values, values.nextafter(infinity), values.nextafter(-infinity)))
    weight = weight[weight.abs() <= row.absmax].repeat(2, 1)
    weight[1] = -weight[1]
    expected, actual = quantize_weight.reference(weight, str(layout)), ops.quantize_weight(weight, str(layout))
    assert (expected[1] == 1).all() and torch.equal(actual[0], expected[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (3, 66), (39, 99)])
@pytest.mark.parametrize("layout", ["int4_sym_g32_bf16", "int8_asym_channel_f32"])
def test_weight_that_is_not_finite_is_refused(value: float, place: tuple[int, int], layout: str, isa: str) -> None:
    weight = torch.randn(40, 100)
    weight[place] = value
    with pytest.raises(RuntimeError, match="weight has NaN or infinite values"):
        ops.quantize_weight(weight, layout)


@pytest.mark.parametrize(
    ("weight", "layout", "fullrange", "message"),
    [
        (torch.zeros(4), "int4_sym_g32_bf16", False, r"weight has 1 dimensions; expected \[N, K\]"),
        (torch.zeros(4, 32, dtype=torch.int8), "int4_sym_g32_bf16", False, "weight has dtype int8; valid: float32"),
        (torch.zeros(4, 0), "int4_sym_g32_bf16", False, "in_features is 0; valid: 1 to 2147483647"),
        (torch.zeros(4, 32), "int5_sym_g32_bf16", False, "'?int5|layout is 'int5"),
        (
            torch.zeros(4, 32),
            "int4_asym_g32_bf16",
            True,
            "fullrange is True for the layout int4_asym_g32_bf16; valid for sym",
        ),
        (
            torch.zeros(4, 32),
            "nf4_sym_g32_bf16",
            True,
            "fullrange is True for the layout nf4_sym_g32_bf16; valid for sym",
        ),
    ],
)
def test_bad_arguments(weight: torch.Tensor, layout: str, fullrange: bool, message: str, isa: str) -> None:
    for call in (ops.quantize_weight, quantize_weight.reference):
        with pytest.raises(RuntimeError, match=message):
            call(weight, layout, fullrange)
