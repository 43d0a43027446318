import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrt.llm.checkpoints.int8_rows import Int8RowsReader, matches
from llmrt.llm.checkpoints.reader import Entry
from llmrt.ops.formats import dequantize

NAME = "model.layers.0.mlp.gate_proj"
ROWS = {"quant_method": "w8a8_int8", "is_dynamic": True}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def integers(n, k):
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    weight.view(-1)[0], weight.view(-1)[-1] = -128, 127
    return weight


def entries(tensors):
    return {key: Entry(tuple(t.shape), t.dtype) for key, t in tensors.items()}


def read(n, k, tensors, config):
    reader = Int8RowsReader(config)
    assert matches(config) and reader.quantizes(NAME, entries(tensors))
    reader.check(NAME, k, n, entries(tensors))
    return reader.read(NAME, k, n, tensors)


@pytest.mark.parametrize("shape", [(), (1,), (21,), (21, 1)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows(shape, dtype):
    weight, scales, bias = integers(21, 51), (torch.rand(shape) + 0.1).to(dtype), torch.randn(21)
    got = read(21, 51, {"weight": weight, "weight_scale": scales, "bias": bias}, ROWS)
    assert str(got.layout).startswith("int8_sym_channel_") and got.layout.scale_dtype == dtype
    assert torch.equal(dequantize(*got.canonical, got.layout, 51), weight.float() * scales.float().reshape(-1, 1))
    assert torch.equal(got.bias, bias) and got.perm is None


@pytest.mark.parametrize("n, k", [(130, 140), (5, 20), (128, 256)])
def test_blocks(n, k):
    weight, scales = integers(n, k), torch.rand(-(-n // 128), -(-k // 128)) + 0.1
    config = {"quant_method": "blockwise_int8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    got = read(n, k, {"weight": weight, "weight_scale_inv": scales}, config)
    assert str(got.layout) == "int8_sym_g128_f32"
    rows, columns = torch.arange(n) // 128, torch.arange(k) // 128
    assert torch.equal(dequantize(*got.canonical, got.layout, k), weight.float() * scales[rows][:, columns])


def test_bitsandbytes():
    weight, largest = integers(6, 33), torch.rand(6) + 0.1
    tensors = {"weight": weight, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    got = read(6, 33, tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    expected = weight.double() * largest.double().unsqueeze(1) / 127
    torch.testing.assert_close(dequantize(*got.canonical, got.layout, 33).double(), expected, rtol=2e-7, atol=0)
    tensors["weight_format"].fill_(3)
    with pytest.raises(ValueError, match=r"weight_format is 3; valid: 0 \(row\)"):
        read(6, 33, tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert not matches({"quant_method": "bitsandbytes", "load_in_4bit": True})


def test_what_is_not_quantized():
    reader = Int8RowsReader(ROWS)
    assert not reader.quantizes("lm_head", {"weight": Entry((4, 8), torch.bfloat16)})
    assert not matches({"quant_method": "fp8"})
    with pytest.raises(ValueError, match="there is no weight_block_size"):
        Int8RowsReader({"quant_method": "blockwise_int8"})


DAMAGE = [
    ("weight", lambda t: None, "the checkpoint has no .*weight; it has weight_scale"),
    ("weight", lambda t: t[:, 1:], r"weight has shape \[9, 19\]; expected \[9, 20\]"),
    ("weight", lambda t: t.t(), r"weight has shape \[20, 9\]; expected \[9, 20\]"),
    ("weight", lambda t: t.view(torch.uint8), "weight has dtype uint8; valid: int8"),
    ("weight", lambda t: t.float(), "weight has dtype float32; valid: int8"),
    ("weight_scale", lambda t: None, "the checkpoint has no .*weight_scale; it has weight"),
    ("weight_scale", lambda t: t[1:], r"weight_scale has shape \[8, 1\]; expected \[9, 1\] or \[9\]"),
    ("weight_scale", lambda t: t.double(), "weight_scale has dtype float64; valid: float32, bfloat16, float16"),
    ("weight_scale", lambda t: t * float("nan"), "weight_scale has NaN"),
    ("weight_scale", lambda t: -t / 0, "weight_scale has NaN or infinite"),
]


@pytest.mark.parametrize("suffix, change, message", DAMAGE)
def test_damaged_linears(suffix, change, message):
    tensors = {"weight": integers(9, 20), "weight_scale": torch.rand(9, 1)}
    damaged = change(tensors.pop(suffix))
    if damaged is not None:
        tensors[suffix] = damaged
    with pytest.raises(ValueError, match=message):
        Int8RowsReader(ROWS).read(NAME, 20, 9, tensors)


SHAPES = st.lists(st.sampled_from([0, 1, 2, 9, 20, 128]), max_size=3)
DTYPES = st.sampled_from([*FLOATS, torch.float64, torch.int8, torch.uint8, torch.int64])
NAMES = st.sampled_from(["weight", "weight_scale", "weight_scale_inv", "SCB", "weight_format"])
BLOCKS = st.one_of(st.none(), st.lists(st.integers(-2, 1 << 70), max_size=3), st.text(max_size=4))


@settings(max_examples=50, derandomize=True, deadline=None)
@given(NAMES, SHAPES, DTYPES, BLOCKS, st.binary(min_size=8, max_size=8))
def test_any_values(suffix, shape, dtype, block, content):
    tensors = {"weight": integers(9, 20), "weight_scale": torch.rand(9, 1)}
    size = torch.Size(shape).numel() * dtype.itemsize
    filled = bytearray((content * (size // 8 + 1))[:size]) or bytearray(1)
    tensors[suffix] = torch.frombuffer(filled, dtype=torch.uint8)[:size].view(dtype).reshape(shape)
    try:
        got = Int8RowsReader({**ROWS, "weight_block_size": block}).read(NAME, 20, 9, tensors)
    except ValueError as error:
        assert NAME in str(error) or "weight_block_size" in str(error)
    else:
        weight, scales = tensors["weight"].float(), tensors["weight_scale"].float().reshape(-1, 1)
        assert torch.equal(dequantize(*got.canonical, got.layout, 20), weight * scales)
