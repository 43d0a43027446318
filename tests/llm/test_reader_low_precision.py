"""State dicts of packed linears with a map of keys: every shape of scales and zeros, both foreign layouts, missing keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_packers import (
    awq_tensors,
    dense,
    entries,
    gptq_tensors,
    pack_rows,
    random_integers,
    shuffled,
)

from llmrt.llm.checkpoints.low_precision import LowPrecisionReader


def state(weight, scale=None, zero=None, dtype=torch.int32):
    return {
        "packed_weight": pack_rows(weight.codes, 4).to(dtype),
        "scale": weight.scales if scale is None else scale,
        "packed_zp": weight.zeros.int() if zero is None else zero,
    }


def read(config, tensors, k, n):
    reader = LowPrecisionReader(config)
    assert reader.quantizes("q", entries(tensors))
    reader.check("q", k, n, entries(tensors))
    return reader.read("q", k, n, tensors)


@pytest.mark.parametrize("n, k, group", [(16, 64, 32), (7, 64, 16), (9, 45, 15), (1, 64, 32), (8, 64, -1), (5, 13, -1)])
@pytest.mark.parametrize("packed", [None, "groups", "outputs"])
def test_values_are_exact(n, k, group, packed):
    weight = random_integers(n, k, group, 4, zero=(0, 15))
    zero = {
        None: weight.zeros.int(),
        "groups": pack_rows(weight.zeros, 4),
        "outputs": pack_rows(weight.zeros.t(), 4).t().contiguous(),
    }[packed]
    if zero.shape == weight.zeros.shape and packed:
        zero = weight.zeros.int()  # one field to a word either way: the shape says one zero each
    found = read({}, state(weight, zero=zero), k, n)
    assert torch.equal(dense(found, k), weight.weight)
    assert found.bias is None and found.layout.scale_dtype == torch.float16


@pytest.mark.parametrize("shape", [(16,), (16, 1), (1, 16)])
@pytest.mark.parametrize("zero", ["same", "packed"])
def test_one_scale_per_row(shape, zero):
    weight = random_integers(16, 40, -1, 4)
    scale = weight.scales.reshape(shape)
    zeros = weight.zeros.int().reshape(shape)
    if zero == "packed":
        zeros = pack_rows(weight.zeros.t(), 4)
        zeros = zeros if len(shape) == 2 else zeros[0]
    found = read({}, state(weight, scale, zeros), 40, 16)
    assert torch.equal(dense(found, 40), weight.weight)
    assert found.layout.group_size == -1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_dtypes_of_the_values(dtype):
    weight = random_integers(16, 64, 32, 4)
    scales = (weight.scales.float() * 0 + 0.5).to(dtype)
    weight = weight._replace(scales=scales.float())
    for words, zeros in ((torch.int64, torch.int64), (torch.int32, torch.uint8), (torch.int32, torch.float32)):
        found = read({}, state(weight, scales, weight.zeros.to(zeros), words), 64, 16)
        assert torch.equal(dense(found, 64), weight.weight)
        assert found.layout.scale_dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def test_keys_and_bias():
    weight = random_integers(16, 64, 32, 4, symmetric=True)
    bias = torch.randn(16)
    own = state(weight)
    tensors = {"w": own["packed_weight"], "s": own["scale"], "z": own["packed_zp"], "b": bias}
    keys = {"weight_key": "w", "scale_key": "s", "zero_point_key": "z", "bias_key": "b"}
    found = read(keys, tensors, 64, 16)
    assert torch.equal(dense(found, 64), weight.weight) and torch.equal(found.bias, bias)
    assert str(found.layout) == "int4_sym_g32_f16"
    del tensors["z"]
    for values in ({**keys, "zero_point_key": None}, {**keys, "sym": True}):
        assert torch.equal(dense(read(values, tensors, 64, 16), 64), weight.weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("given", [{}, {"group_size": 32}, {"desc_act": True}])
def test_gptq_layout(bits, given):
    """A state dict alone: bits and groups are those of the shapes."""
    weight = random_integers(16, 96, 32, bits)
    weight = shuffled(weight) if "desc_act" in given else weight
    found = read({"quant_method": "gptq", **given}, gptq_tensors(weight, bits), 96, 16)
    assert torch.equal(dense(found, 96), weight.weight)


@pytest.mark.parametrize("group", [32, -1])
def test_awq_layout_and_keys(group):
    weight = random_integers(16, 96, group, 4)
    tensors = {"wq" if key == "qweight" else key: t for key, t in awq_tensors(weight).items()}
    found = read({"quant_method": "awq", "weight_key": "wq"}, tensors, 96, 16)
    assert torch.equal(dense(found, 96), weight.weight)


def test_a_linear_that_is_not_there():
    reader = LowPrecisionReader({})
    assert not reader.quantizes("lm_head", {}) and not reader.quantizes("lm_head", entries({"weight": torch.ones(2)}))


GOOD = state(random_integers(16, 64, 32, 4))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"packed_weight": None}, r"no q.packed_weight \(weight_key is 'packed_weight'\); it has packed_zp, scale"),
        ({"scale": None}, r"no q.scale \(scale_key is 'scale'\)"),
        ({"packed_zp": None}, r"no q.packed_zp \(zero_point_key is 'packed_zp'\)"),
        ({"packed_weight": torch.zeros(8, 16).int()}, r"q.packed_weight has shape \[8, 16\]; expected \[16, 8\]"),
        ({"packed_weight": torch.zeros(16, 8)}, r"q.packed_weight has dtype float32"),
        ({"scale": torch.zeros(2, 16)}, r"q.scale has shape \[2, 16\]; valid: \[16\], \[16, 1\], \[1, 16\]"),
        ({"scale": torch.zeros(16, 2).int()}, r"q.scale has dtype int32"),
        ({"scale": torch.full((16, 2), float("nan"))}, "q: scales has NaN"),
        ({"scale": torch.ones(16, 60)}, "q.scale has 60 groups"),
        ({"packed_zp": torch.full((16, 2), 16)}, r"q.packed_zp has values 16 .. 16; valid: 0 .. 15"),
        ({"packed_zp": torch.full((16, 2), 7.5)}, r"q.packed_zp has values 7.5"),
        ({"packed_zp": torch.full((16, 2), float("nan"))}, r"q.packed_zp has values nan"),
        ({"packed_zp": torch.zeros(3, 3).int()}, r"q.packed_zp has shape \[3, 3\]; expected \[16, 2\], as scale"),
        ({"packed_zp": torch.zeros(16, 1)}, r"q.packed_zp has dtype float32; eight zeros to a word need int32"),
        ({"bias": torch.zeros(3)}, r"q.bias has shape \[3\]"),
    ],
)
def test_refusals(change, text):
    tensors = {key: t for key, t in {**GOOD, **change}.items() if t is not None}
    with pytest.raises(ValueError, match=text):
        LowPrecisionReader({}).read("q", 64, 16, tensors)


@pytest.mark.parametrize(
    "values, text",
    [
        ({"quant_method": "gguf"}, "quant_method is 'gguf'; valid: gptq, awq"),
        ({"weight_key": None}, "weight_key is None; expected the name of a key"),
        ({"scale_key": 3}, "scale_key is 3"),
        ({"bits": 8}, "bits is 8; valid: 4"),
        ({"quant_method": "gptq", "bits": 5}, "bits is 5"),
    ],
)
def test_configurations(values, text):
    with pytest.raises(ValueError, match=text):
        LowPrecisionReader(values)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    values=st.dictionaries(
        st.sampled_from(["quant_method", "bits", "group_size", "sym", "weight_key", "zero_point_key"]),
        st.one_of(st.none(), st.booleans(), st.integers(-1, 40), st.sampled_from(["gptq", "awq", "qweight", "scale"])),
        max_size=2,
    ),
    strange=st.dictionaries(
        st.sampled_from(["packed_weight", "scale", "packed_zp", "qweight", "scales", "qzeros", "bias"]),
        st.tuples(
            st.lists(st.integers(0, 33), max_size=3),
            st.sampled_from([torch.int32, torch.int64, torch.half, torch.uint8, torch.bool]),
        ),
        max_size=2,
    ),
    own=st.booleans(),
)
def test_fuzz(values, strange, own):
    weight = random_integers(16, 64, 32, 4)
    tensors = state(weight) if own else gptq_tensors(weight, 4)
    for suffix, (shape, dtype) in strange.items():
        tensors[suffix] = torch.randint(0, 2, shape).to(dtype)
    try:
        config = values if own else {"quant_method": "gptq", **values}
        found = LowPrecisionReader(config).read("q", 64, 16, tensors)
    except ValueError as error:
        assert "q" in str(error) or "_key is" in str(error)
        return
    assert dense(found, 64).shape == (16, 64)
    if not strange and not values.keys() & {"group_size", "sym", "zero_point_key"}:
        assert torch.equal(dense(found, 64), weight.weight)
