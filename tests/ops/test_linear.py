"""Packed weights and quant_linear beyond the samples: exactness, sharing between tiers, threads, bad input."""

import pytest
import torch

from llmrt import ops
from llmrt.ops import FORMATS, Layout, dequantize
from llmrt.ops.formats import SCALE_DTYPES, Format, join_codes
from llmrt.ops.linear import LAYOUTS


def packed(n: int, k: int, layout: Layout) -> torch.Tensor:
    return ops.pack_weight(*ops.quantize(torch.randn(n, k) / k**0.5, layout), str(layout), k)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_unpacking_gives_back_the_bits(layout: Layout, isa: str) -> None:
    for n, k in ((70, 333), (33, 1), (1, 128)):
        canonical = ops.quantize(torch.randn(n, k), layout)
        again = ops.unpack_weight(ops.pack_weight(*canonical, str(layout), k), str(layout), n, k)
        assert torch.equal(again[0], canonical[0]) and again[1].dtype == layout.scale_dtype
        assert torch.equal(again[1].view(torch.uint8), canonical[1].view(torch.uint8))
        assert again[2].numel() == 0 if canonical[2] is None else torch.equal(again[2], canonical[2])


@pytest.mark.parametrize("zero", [0, 15, 16, 255])
def test_every_zero_point_is_exact(zero: int, isa: str) -> None:
    """GPTQ's stored zero of 15 means 16, one more than a code can be."""
    layout = Layout("int4", True, 32, torch.float32)
    codes, scales, zeros = ops.quantize(torch.randn(5, 96), layout)
    weight = ops.pack_weight(codes, scales, torch.full_like(zeros, zero), str(layout), 96)
    x = torch.randn(3, 96)
    expected = x.double() @ ops.dequantize(codes, scales.double(), torch.full_like(zeros, zero), layout, 96).T
    actual = ops.quant_linear(x, weight, None, None, str(layout), 5, "fp32")
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("compute", ["int8", "bf16", "fp32"])
def test_thread_count_does_not_change_the_bits(compute: str, isa: str) -> None:
    layout, threads = Layout(), torch.get_num_threads()
    weight, x = packed(200, 256, layout), torch.randn(70, 256)
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.quant_linear(x, weight, None, None, str(layout), 200, compute))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("compute", ["int8", "bf16", "fp32"])
def test_nan_and_inf_reach_the_output(compute: str, isa: str) -> None:
    layout = Layout()
    weight, x = packed(40, 256, layout), torch.randn(3, 256)
    x[0, 5], x[2, 200] = float("nan"), float("inf")
    y = ops.quant_linear(x, weight, None, None, str(layout), 40, compute)
    assert not y[0].isfinite().any() and y[1].isfinite().all() and not y[2].isfinite().all()


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_inputs_too_small_for_a_scale_count_as_zero(rows: int, isa: str) -> None:
    layout = Layout("int8", False, 32, torch.float32)
    weight, x = packed(40, 128, layout), torch.zeros(rows, 128)
    x[:, 32:64] = torch.randn(rows, 32)
    expected = ops.quant_linear(x, weight, None, None, str(layout), 40, "int8")
    x[:, 3], x[:, 5], x[:, 70] = 1e-37, -1e-38, 1e-45
    assert torch.equal(ops.quant_linear(x, weight, None, None, str(layout), 40, "int8"), expected)


@pytest.mark.parametrize("zero", [None, 0, 255])
@pytest.mark.parametrize("name", ["int4", "int8", "nf4"])
def test_sums_of_the_largest_codes_fit(name: str, zero: int | None, isa: str) -> None:
    asymmetric = zero is not None and name != "nf4"
    layout, k = Layout(name, asymmetric, 1024, torch.float32), 2048
    zeros = torch.full((33, 2), zero, dtype=torch.uint8) if asymmetric else None
    for fill in (0, 255):
        codes, scales = torch.full((33, k * layout.format.bits // 8), fill, dtype=torch.uint8), torch.ones(33, 2)
        weight = ops.pack_weight(codes, scales, zeros, str(layout), k)
        row = dequantize(codes, scales.double(), zeros, layout, k, "int8")[0]
        for rows in (1, 3, 40):
            y = ops.quant_linear(torch.full((rows, k), -127.0), weight, None, None, str(layout), 33, "int8")
            torch.testing.assert_close(y.double(), (-127 * row.sum()).expand(rows, 33), rtol=1e-6, atol=1e-3)


def test_sizes_that_do_not_fit_64_bits_are_refused(isa: str) -> None:
    k = (1 << 62) + 32  # 4 * k has the low bits of 128
    with pytest.raises(RuntimeError, match=f"in_features is {k}; valid: 1 to 2147483647"):
        ops.pack_weight(torch.zeros(3, 16, dtype=torch.uint8), torch.ones(3, 1), None, "int4_sym_channel_f32", k)
    with pytest.raises(RuntimeError, match=f"in_features is {k}; valid: 1 to 2147483647"):
        ops.unpack_weight(torch.zeros(1, 1, 2176, dtype=torch.uint8), "int4_sym_channel_f32", 3, k)


#: Every format with every compute that it has.
PRODUCTS = [(row, compute) for row in FORMATS.values() for compute in row.computes if compute != "fp16"]
product = pytest.mark.parametrize(("row", "compute"), PRODUCTS, ids=lambda v: getattr(v, "name", v))


@product
def test_every_number_of_rows(row: Format, compute: str, isa: str) -> None:
    """The register tiles of up to 12 rows, and panels, whole row blocks and a rest."""
    layout = Layout(row.name, False, 32, torch.float32)
    weight, x, bias = packed(40, 416, layout), torch.randn(41, 416), torch.randn(40)
    arguments = (weight, bias, None, str(layout), 40, compute, "relu")
    expected = ops.OPERATORS["quant_linear"].reference(x.double(), *arguments)
    for m in (*range(1, 14), 25, 41):
        torch.testing.assert_close(ops.quant_linear(x[:m], *arguments).double(), expected[:m], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("compute", ["int8", "bf16"])
def test_more_activations_than_a_cache_holds(compute: str, isa: str) -> None:
    """Several chunks of rows, spans of inputs and groups of outputs, the last of each with a rest."""
    layout, k, n = Layout("int4", True, 128, torch.bfloat16), 4300, 300
    weight, x = packed(n, k, layout), torch.randn(290, k).bfloat16()
    expected = ops.OPERATORS["quant_linear"].reference(x.double(), weight, None, None, str(layout), n, compute)
    actual = ops.quant_linear(x, weight, None, None, str(layout), n, compute)
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=2e-5)


@pytest.mark.parametrize("name", ["int4", "int8", "fp8_e4m3"])
def test_scales_of_every_size_side_by_side(name: str, isa: str) -> None:
    """Sums of one group go on in the next one's unit only where that loses nothing."""
    layout, k = Layout(name, False, 32, torch.float32), 640
    codes, scales, zeros = ops.quantize(torch.randn(40, k), layout)
    scales = scales * 10.0 ** torch.randint(-25, 15, scales.shape)
    scales[torch.rand(scales.shape) < 0.2] = 0.0
    scales[3] = 1.0  # the same for all groups, and
    scales[4] = 2.0 ** torch.arange(20)  # never the same
    weight, x = ops.pack_weight(codes, scales, zeros, str(layout), k), torch.randn(30, k).bfloat16()
    dense = dequantize(codes, scales.double(), zeros, layout, k)
    most = x.double().abs() @ dense.abs().T
    for compute in ("bf16", "fp32"):
        actual = ops.quant_linear(x.float(), weight, None, None, str(layout), 40, compute)
        assert ((actual.double() - x.double() @ dense.T).abs() <= 2e-6 * most).all()


@product
@pytest.mark.parametrize("scale", ["f32", "bf16", "e8m0"])
def test_every_code_is_exact(row: Format, compute: str, scale: str, isa: str) -> None:
    """Unit vectors read the weights: all codes but NaN and infinity, subnormal ones among them, in the tiles and in panels."""
    if scale not in row.scale_names:
        pytest.skip("a combination that does not exist")
    layout = Layout(row.name, False, 32, SCALE_DTYPES[scale])
    values = torch.arange(row.levels + 1, dtype=torch.uint8)
    if row.dtype is not None:
        values = values[values.view(row.dtype).float().isfinite()]
    codes = join_codes(torch.stack([values.roll(5 * n).repeat(16)[:128] for n in range(33)]), row.bits)
    powers = 2.0 ** torch.arange(33 * 4).view(33, 4).remainder(9).sub(4)
    scales = powers.to(layout.scale_dtype)
    expected = dequantize(codes, scales, None, layout, 128, compute).T
    weight, x = ops.pack_weight(codes, scales, None, str(layout), 128), torch.eye(128)
    exact = compute != "int8"  # 127 * (1 / 127) rounds
    for rows in (slice(None), slice(0, 4), slice(77, 78)):
        y = ops.quant_linear(x[rows], weight, None, None, str(layout), 33, compute)
        torch.testing.assert_close(y, expected[rows], rtol=0 if exact else 1e-6, atol=0)


@pytest.mark.parametrize("row", [row for row in FORMATS.values() if row.dtype is not None], ids=lambda row: row.name)
def test_floats_of_8_bits_that_are_not_finite_are_refused(row: Format, isa: str) -> None:
    layout = Layout(row.name, False, 32, torch.float8_e8m0fnu)
    codes, scales, _ = ops.quantize(torch.randn(4, 64), layout)
    wrong = torch.arange(256, dtype=torch.uint8)
    wrong = wrong[~wrong.view(row.dtype).float().isfinite()]
    assert len(wrong) == {"fp8_e4m3": 2, "fp8_e5m2": 8}[row.name]
    for code in wrong:
        bad = codes.clone()
        bad[2, 63] = code
        with pytest.raises(RuntimeError, match=f"codes has NaN or infinite values of {row.name}"):
            ops.pack_weight(bad, scales, None, str(layout), 64)
    scales.view(torch.uint8)[3, 1] = 255
    with pytest.raises(RuntimeError, match="scales has NaN or infinite values"):
        ops.pack_weight(codes, scales, None, str(layout), 64)


def test_combinations_that_do_not_exist_name_those_that_do(isa: str) -> None:
    layout = Layout("fp8_e4m3", False, 32)
    weight, x = packed(40, 64, layout), torch.randn(2, 64)
    with pytest.raises(RuntimeError, match="compute is 'int8' for fp8_e4m3; valid: bf16, fp16, fp32"):
        ops.quant_linear(x, weight, None, None, str(layout), 40, "int8")
    for text in ("nf4_asym_g32_f32", "fp8_e4m3_asym_g32_f32", "int4_sym_g32_e8m0", "nf4_sym_g32_e8m0"):
        with pytest.raises(RuntimeError, match=r"asymmetric is|scale_dtype is|layout is '.*': .* valid for"):
            ops.quant_linear(x, weight, None, None, text, 40, "fp32")


def call(**change: object) -> torch.Tensor:
    arguments: dict[str, object] = {
        "x": torch.randn(2, 128),
        "weight": packed(48, 128, Layout()),
        "bias": None,
        "other": None,
        "layout": str(Layout()),
        "out_features": 48,
        "compute": "int8",
        "epilogue": "none",
    }
    return ops.quant_linear(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 128, dtype=torch.int64)}, "x has dtype int64; valid: float32, bfloat16, float16"),
        ({"x": torch.tensor(1.0)}, "x is a scalar"),
        ({"x": torch.randn(2, 300)}, r"weight has shape \[2, 1, 2112\]; expected \[2, 3, 2112\]"),
        ({"weight": torch.zeros(2, 1, 2112)}, "weight has dtype float32; expected uint8"),
        ({"out_features": 70}, r"weight has shape \[2, 1, 2112\]; expected \[3, 1, 2112\]"),
        ({"bias": torch.randn(47)}, r"bias has shape \[47\]; expected \[48\]"),
        ({"bias": torch.ones(48, dtype=torch.int32)}, "bias has dtype int32"),
        ({"layout": "int4_sym_g128"}, "layout is 'int4_sym_g128'; expected the form"),
        ({"layout": "int4_asym_g128_bf16"}, r"weight has shape"),
        ({"compute": "int7"}, "compute is 'int7'; valid: int8, bf16, fp16, fp32"),
        ({"epilogue": "swish"}, "epilogue is 'swish'; valid: none, relu"),
        ({"epilogue": "add"}, "other missing for epilogue 'add'"),
        ({"other": torch.randn(2, 48)}, "other given for epilogue 'none'"),
        ({"epilogue": "mul", "other": torch.randn(2, 47)}, r"other has shape \[2, 47\]"),
        ({"epilogue": "mul", "other": torch.randn(2, 48).half()}, "other has dtype float16; expected"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str, isa: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(**change)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale_that_is_not_finite_is_refused(value: float, dtype: torch.dtype, isa: str) -> None:
    layout = Layout("int4", False, 32, dtype)
    codes, scales, _ = ops.quantize(torch.randn(4, 64), layout)
    scales[2, 1] = value
    with pytest.raises(RuntimeError, match="scales has NaN or infinite values"):
        ops.pack_weight(codes, scales, None, str(layout), 64)


def test_packing_names_what_does_not_fit(isa: str) -> None:
    layout = Layout("int4", True, 32)
    codes, scales, zeros = ops.quantize(torch.randn(4, 64), layout)
    with pytest.raises(RuntimeError, match=r"codes has shape \[4, 32\]; expected \[any, 48\]"):
        ops.pack_weight(codes, scales, zeros, str(layout), 96)
    with pytest.raises(RuntimeError, match="zeros missing for layout int4_asym_g32_bf16"):
        ops.pack_weight(codes, scales, None, str(layout), 64)
    with pytest.raises(RuntimeError, match="scales has dtype float32; expected bfloat16"):
        ops.pack_weight(codes, scales.float(), zeros, str(layout), 64)
    with pytest.raises(RuntimeError, match=r"packed has shape \[1, 1, 2432\]; expected"):
        ops.unpack_weight(ops.pack_weight(codes, scales, zeros, str(layout), 64), str(layout), 40, 64)
