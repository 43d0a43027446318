import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrt.llm.checkpoints.fp8_blocks import Fp8BlocksReader, matches
from llmrt.llm.checkpoints.reader import Entry
from llmrt.ops.formats import dequantize

NAME = "model.layers.0.mlp.gate_proj"
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}


def floats(n, k, dtype=torch.float8_e4m3fn):
    return (torch.randn(n, k) * 40).clamp(-440, 440).to(dtype)


def entries(tensors):
    return {key: Entry(tuple(t.shape), t.dtype) for key, t in tensors.items()}


def read(n, k, tensors, config):
    reader = Fp8BlocksReader(config)
    assert reader.quantizes(NAME, entries(tensors))
    reader.check(NAME, k, n, entries(tensors))
    return reader.read(NAME, k, n, tensors)


def by_blocks(weight, scales, rows, columns):
    """Return the weight that blocks stand for, one after the other as DeepSeek's own conversion does it."""
    result = weight.float()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            result[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] *= float(scales[i, j])
    return result


@pytest.mark.parametrize(
    "n, k, rows, columns", [(256, 384, 128, 128), (130, 200, 128, 128), (7, 33, 128, 128), (65, 72, 32, 64)]
)
@pytest.mark.parametrize("dtype, text", [(torch.float32, "f32"), (torch.bfloat16, "bf16")])
def test_blocks(n, k, rows, columns, dtype, text):
    weight = floats(n, k)
    scales = (torch.rand(-(-n // rows), -(-k // columns)) + 0.01).to(dtype)
    tensors = {"weight": weight, "weight_scale_inv": scales}
    got = read(n, k, tensors, {**BLOCKS, "weight_block_size": [rows, columns]})
    assert str(got.layout) == f"fp8_e4m3_sym_g{columns}_{text}" and got.perm is None and got.bias is None
    assert torch.equal(dequantize(*got.canonical, got.layout, k), by_blocks(weight, scales, rows, columns))


@pytest.mark.parametrize("as_bytes", [False, True])
def test_scales_that_are_powers_of_two(as_bytes):
    weight, powers = floats(130, 140), torch.tensor([[0, 127], [130, 100]], dtype=torch.uint8)
    exponents = powers.view(torch.float8_e8m0fnu)
    tensors = {"weight": weight, "weight_scale_inv": powers if as_bytes else exponents}
    got = read(130, 140, tensors, {**BLOCKS, "scale_fmt": "ue8m0"})
    assert str(got.layout) == "fp8_e4m3_sym_g128_e8m0"
    assert torch.equal(dequantize(*got.canonical, got.layout, 140), by_blocks(weight, exponents.float(), 128, 128))
    if as_bytes:
        with pytest.raises(ValueError, match="weight_scale_inv has dtype uint8; valid: float32"):
            read(130, 140, tensors, BLOCKS)


@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8", "w8a8_fp8", "modelopt"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (19,), (19, 1)])
def test_scales_of_tensors_and_rows(method, shape):
    config = {"quant_method": method, "quant_algo": "FP8"}
    assert matches(config)
    weight, scales = floats(19, 45), torch.rand(shape) + 0.1
    got = read(19, 45, {"weight": weight, "weight_scale": scales, "input_scale": torch.ones(1)}, config)
    assert str(got.layout) == "fp8_e4m3_sym_channel_f32"
    assert torch.equal(dequantize(*got.canonical, got.layout, 45), weight.float() * scales.reshape(-1, 1))


def test_other_floats_and_bias():
    weight, bias = floats(5, 40, torch.float8_e5m2), torch.randn(5)
    got = read(5, 40, {"weight": weight, "weight_scale_inv": torch.tensor(0.5), "bias": bias}, {"quant_method": "fp8"})
    assert str(got.layout) == "fp8_e5m2_sym_channel_f32" and torch.equal(got.bias, bias)
    assert torch.equal(dequantize(*got.canonical, got.layout, 40), weight.float() * 0.5)


def test_what_is_not_quantized():
    reader = Fp8BlocksReader(BLOCKS)
    assert not reader.quantizes("lm_head", {"weight": Entry((4, 8), torch.bfloat16)})
    assert not reader.quantizes("norm", {"bias": Entry((4,), torch.bfloat16)})
    assert matches(BLOCKS) and not matches({"quant_method": "modelopt", "quant_algo": "NVFP4"}) and not matches({})
    with pytest.warns(UserWarning, match="activation_scheme 'dynamic' is not used"):
        Fp8BlocksReader({**BLOCKS, "activation_scheme": "dynamic"})


@pytest.mark.parametrize(
    "size", [[128], [128, 128, 1], [0, 128], [128, -128], [128, 1 << 60], [128, 4], ["a", "b"], [True, 128], 7]
)
def test_refused_block_sizes(size):
    with pytest.raises(ValueError, match=r"weight_block_size is .*expected \[rows, columns\]"):
        Fp8BlocksReader({**BLOCKS, "weight_block_size": size})


DAMAGE = [
    ("weight", lambda t: None, "the checkpoint has no .*weight; it has bias, weight_scale_inv"),
    ("weight", lambda t: t[:-1], r"weight has shape \[129, 140\]; expected \[130, 140\]"),
    ("weight", lambda t: t.view(torch.int8), "weight has dtype int8; valid: float8_e4m3fn, float8_e5m2"),
    ("weight", lambda t: t.view(torch.float8_e4m3fnuz), "weight has dtype float8_e4m3fnuz"),
    ("weight", lambda t: (t.view(torch.uint8) | 127).view(t.dtype), "weight has NaN"),
    ("weight_scale_inv", lambda t: None, "the checkpoint has no .*weight_scale_inv; it has bias, weight"),
    ("weight_scale_inv", lambda t: t[:, :1], r"weight_scale_inv has shape \[2, 1\]; expected \[2, 2\]"),
    ("weight_scale_inv", lambda t: t.t().reshape(4), r"weight_scale_inv has shape \[4\]; expected \[2, 2\]"),
    ("weight_scale_inv", lambda t: t.double(), "weight_scale_inv has dtype float64; valid: float32, bfloat16"),
    ("weight_scale_inv", lambda t: t * float("nan"), "weight_scale_inv has NaN"),
    ("weight_scale_inv", lambda t: t / 0, "weight_scale_inv has NaN or infinite"),
    ("weight_scale_inv", lambda t: torch.full((2, 2), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu), "has NaN"),
    ("bias", lambda t: torch.zeros(1), r"bias has shape \[1\]; expected \[130\]"),
]


@pytest.mark.parametrize("suffix, change, message", DAMAGE)
def test_damaged_linears(suffix, change, message):
    tensors = {"weight": floats(130, 140), "weight_scale_inv": torch.rand(2, 2), "bias": torch.zeros(130)}
    damaged = change(tensors.pop(suffix))
    if damaged is not None:
        tensors[suffix] = damaged
    with pytest.raises(ValueError, match=message):
        Fp8BlocksReader(BLOCKS).read(NAME, 140, 130, tensors)


DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
    torch.uint8,
    torch.int8,
    torch.int64,
]
SHAPES = st.lists(st.sampled_from([0, 1, 2, 9, 20, 128]), max_size=3)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(
    st.sampled_from(["weight", "weight_scale_inv"]),
    SHAPES,
    st.sampled_from(DTYPES),
    st.one_of(st.none(), st.lists(st.integers(-2, 1 << 70), max_size=3), st.text(max_size=4)),
    st.binary(min_size=8, max_size=8),
)
def test_any_values(suffix, shape, dtype, block, content):
    tensors = {"weight": floats(9, 20), "weight_scale_inv": torch.rand(1, 1)}
    size = torch.Size(shape).numel() * dtype.itemsize
    filled = bytearray((content * (size // 8 + 1))[:size]) or bytearray(1)
    tensors[suffix] = torch.frombuffer(filled, dtype=torch.uint8)[:size].view(dtype).reshape(shape)
    try:
        reader = Fp8BlocksReader({"quant_method": "fp8", "weight_block_size": block})
        got = reader.read(NAME, 20, 9, tensors)
    except ValueError as error:
        assert NAME in str(error) or "weight_block_size" in str(error)
    else:
        assert torch.equal(got.canonical.qweight, tensors["weight"].contiguous().view(torch.uint8))
        assert got.canonical.scales.shape == (9, got.layout.geometry(20).groups)
