"""static_linear beyond the samples: exact sums, codes, sharing between tiers, threads, bad input."""

import pytest
import torch

from llmrt import ops
from llmrt.ops import Layout
from llmrt.ops.static_linear import quantize_input

LAYOUT = Layout("int8", False, -1, torch.float32)


def weight_of(codes: torch.Tensor, scales: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the packed weight and its sums; scales: ones."""
    scales = torch.ones(len(codes), 1) if scales is None else scales
    return ops.pack_weight(codes, scales, None, str(LAYOUT), codes.shape[1]), ops.weight_sums(codes)


def product(x: torch.Tensor, codes: torch.Tensor, scale: float, zero: int, **change: object) -> torch.Tensor:
    packed, sums = weight_of(codes)
    arguments = {
        "x": x, "weight": packed, "sums": sums, "bias": None, "other": None, "factors": None, "input_scale": scale,
        "input_zero": zero, "layout": str(LAYOUT), "out_features": len(codes),
    }  # fmt: skip
    return ops.static_linear(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("zero", [0, 1, 127, 128, 255])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_sums_are_exact_integers(zero: int, rows: int, isa: str) -> None:
    """Input codes and weight codes over their whole ranges; a scale of one keeps the sums as they are."""
    x = torch.randint(-zero, 256 - zero, (rows, 300)).float()
    codes = torch.randint(0, 256, (37, 300), dtype=torch.uint8)
    expected = x.double() @ (codes.double() - 128).T
    assert torch.equal(product(x, codes, 1.0, zero).double(), expected)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_largest_sums_fit(rows: int, kernel_isa: str) -> None:
    """65536 inputs, all codes at their ends."""
    k = 1 << 16
    codes = torch.zeros(3, k, dtype=torch.uint8)  # -128
    codes[1] = 255
    y = product(torch.full((rows, k), 1000.0), codes, 1.0, 0)
    expected = torch.tensor([-128.0, 127.0, -128.0], dtype=torch.float64) * 255 * k
    torch.testing.assert_close(y.double(), expected.expand(rows, 3), rtol=1e-7, atol=0)
    assert torch.equal(product(torch.full((rows, k), -1000.0), codes, 1.0, 255), -y)


def test_every_tier_gives_the_same_codes(isa: str) -> None:
    """Halves are ties of the rounding; the identity as weight shows the codes."""
    x = torch.cat((torch.arange(-40, 40) / 4, torch.tensor([1e30, -1e30, torch.inf, -torch.inf, 0.0, -0.0])))[None]
    factors = torch.rand(x.shape[1]).exp2()
    codes = (128 + torch.eye(x.shape[1])).to(torch.uint8)
    for zero, scale in ((128, 0.5), (3, 1.0), (250, 0.3)):
        expected = quantize_input(x, factors, scale, zero) * torch.tensor(scale)
        assert torch.equal(product(x, codes, scale, zero, factors=factors), expected)


def test_rows_with_nan_are_nan_and_infinity_is_clamped(isa: str) -> None:
    x = torch.randn(40, 131)
    x[3, 130], x[20, 0], x[21, 5] = torch.nan, torch.inf, torch.nan
    codes = torch.randint(0, 256, (33, 131), dtype=torch.uint8)
    y = product(x, codes, 0.02, 100)
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[3, 21]] = True
    assert y[bad].isnan().all() and y[~bad].isfinite().all()
    assert torch.equal(y[20], product(x[20:21].clamp(max=1e5), codes, 0.02, 100)[0])


def test_thread_count_does_not_change_the_bits(isa: str) -> None:
    x, codes, threads = (
        torch.randn(70, 256),
        torch.randint(0, 256, (200, 256), dtype=torch.uint8),
        torch.get_num_threads(),
    )
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([product(x[:m], codes, 0.03, 120) for m in (1, 13, 70)])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_many_rows_of_many_inputs_come_in_chunks(isa: str) -> None:
    x, codes = torch.randn(150, 8200), torch.randint(0, 256, (40, 8200), dtype=torch.uint8)
    expected = quantize_input(x, None, 0.03, 120).double() @ (codes.double() - 128).T * 0.03
    torch.testing.assert_close(product(x, codes, 0.03, 120).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 128, dtype=torch.int64)}, "x has dtype int64; valid: float32, bfloat16, float16"),
        ({"x": torch.tensor(1.0)}, "x is a scalar"),
        ({"x": torch.randn(2, 300)}, r"weight has shape \[2, 1, 4224\]; expected \[2, 3, 4224\]"),
        ({"x": torch.randn(1, 65537)}, "x has 65537 features; valid: at most 65536"),
        ({"weight": torch.zeros(2, 1, 4224)}, "weight has dtype float32; expected uint8"),
        ({"out_features": 70}, r"weight has shape \[2, 1, 4224\]; expected \[3, 1, 4224\]"),
        ({"out_features": -1}, "out_features is -1; valid: at least 0"),
        ({"sums": torch.zeros(47, dtype=torch.int32)}, r"sums has shape \[47\]; expected \[48\]"),
        ({"sums": torch.zeros(48)}, "sums has dtype float32; expected int32"),
        ({"bias": torch.randn(47)}, r"bias has shape \[47\]; expected \[48\]"),
        ({"factors": torch.randn(127)}, r"factors has shape \[127\]; expected \[128\]"),
        ({"factors": torch.ones(128).half()}, "factors has dtype float16; expected float32"),
        ({"input_scale": 0.0}, "input_scale is 0.*; valid: above 0 and finite"),
        ({"input_scale": float("nan")}, "input_scale is nan; valid"),
        ({"input_scale": float("inf")}, "input_scale is inf; valid"),
        ({"input_zero": 256}, "input_zero is 256; valid: 0 to 255"),
        ({"input_zero": -1}, "input_zero is -1; valid: 0 to 255"),
        ({"layout": "int8_sym_g128_f32"}, "layout is 'int8_sym_g128_f32'; expected int8_sym_channel_"),
        ({"layout": "int4_sym_channel_f32"}, "layout is 'int4_sym_channel_f32'; expected int8_sym_channel_"),
        ({"layout": "int8_asym_channel_f32"}, "layout is 'int8_asym_channel_f32'; expected int8_sym_channel_"),
        ({"layout": "int8"}, "layout is 'int8'; expected the form"),
        ({"epilogue": "swish"}, "epilogue is 'swish'; valid: none, relu"),
        ({"epilogue": "add"}, "other missing for epilogue 'add'"),
        ({"other": torch.randn(2, 48)}, "other given for epilogue 'none'"),
        ({"epilogue": "mul", "other": torch.randn(2, 47)}, r"other has shape \[2, 47\]"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change: dict[str, object], message: str, isa: str) -> None:
    codes = torch.full((48, 128), 130, dtype=torch.uint8)
    with pytest.raises((RuntimeError), match=message):
        product(**{"x": torch.randn(2, 128), "codes": codes, "scale": 0.1, "zero": 128, **change})  # type: ignore[arg-type]
