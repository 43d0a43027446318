"""AWQ linears are read exactly; what is not AWQ of version gemm is refused by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_packers import awq_tensors, dense, entries, random_integers

from llmrt.llm.checkpoints.awq import AwqReader, matches

GOOD = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def read(values, tensors, k, n):
    reader = AwqReader({**GOOD, **values})
    assert reader.quantizes("up", entries(tensors))
    reader.check("up", k, n, entries(tensors))
    return reader.read("up", k, n, tensors)


@pytest.mark.parametrize("n, k, group", [(32, 64, 32), (40, 96, -1), (8, 45, 32), (24, 100, 64), (8, 32, 1024)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_are_exact(n, k, group, dtype):
    weight = random_integers(n, k, group, 4, zero=(0, 15), dtype=dtype)
    bias = torch.randn(n).to(dtype)
    found = read({"group_size": group}, {**awq_tensors(weight), "bias": bias}, k, n)
    assert torch.equal(dense(found, k), weight.weight)
    assert torch.equal(found.bias, bias)
    assert found.perm is None and found.layout.scale_dtype == dtype


def test_order_of_nibbles():
    """The first word of a row, written out: column 0 is nibble 0, column 1 nibble 4, column 7 nibble 7."""
    tensors = awq_tensors(random_integers(8, 32, 32, 4, zero=(0, 0)))
    tensors["qweight"][0, 0] = 0x75316420
    tensors["scales"].fill_(1)
    assert dense(read({}, tensors, 32, 8), 32)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_symmetric_zeros_make_a_symmetric_layout():
    weight = random_integers(16, 64, 32, 4, symmetric=True)
    tensors = awq_tensors(weight)
    found = read({}, tensors, 64, 16)
    assert str(found.layout) == "int4_sym_g32_f16" and found.canonical.zeros is None
    assert torch.equal(dense(found, 64), weight.weight)
    del tensors["qzeros"]
    assert torch.equal(dense(read({"zero_point": False}, tensors, 64, 16), 64), weight.weight)
    with pytest.raises(ValueError, match=r"the checkpoint has no up.qzeros"):
        read({}, tensors, 64, 16)


def test_other_spellings():
    weight = random_integers(16, 64, 16, 4)
    reader = AwqReader({"w_bit": 4, "q_group_size": 16, "version": "GEMM"})
    assert torch.equal(dense(reader.read("up", 64, 16, awq_tensors(weight)), 64), weight.weight)
    assert matches({"quant_method": "awq"}) and not matches({"quant_method": "gptq"})


def test_modules_to_not_convert():
    reader = AwqReader({**GOOD, "modules_to_not_convert": ["lm_head", "gate"]})
    quantized = entries(awq_tensors(random_integers(8, 32, 32, 4)))
    floating = entries({"weight": torch.zeros(8, 32)})
    assert not reader.quantizes("layers.0.gate", floating)
    assert not reader.quantizes("layers.0.gate", {**floating, **quantized})
    assert reader.quantizes("layers.0.up", quantized)


@pytest.mark.parametrize(
    "values, text",
    [
        ({"version": "gemv"}, "version is 'gemv'; readable: gemm"),
        ({"version": "gemv_fast"}, "version is 'gemv_fast'"),
        ({"version": "llm-awq"}, "version is 'llm-awq'"),
        ({"checkpoint_format": "gemv", "version": None}, "version is 'gemv'"),
        ({"bits": 8}, "bits is 8; valid: 4"),
        ({"group_size": -2}, "group_size is -2"),
        ({"zero_point": 1}, "zero_point is 1"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert has 1"),
    ],
)
def test_configurations(values, text):
    with pytest.raises(ValueError, match=text):
        AwqReader({**GOOD, **values})


@pytest.mark.parametrize(
    "change, text",
    [
        ({"qweight": torch.zeros(64, 16, dtype=torch.int32)}, r"up.qweight has shape \[64, 16\]; expected \[64, 2\]"),
        ({"qweight": torch.zeros(64, 2)}, r"up.qweight has dtype float32; valid: int32"),
        ({"qzeros": torch.zeros(2, 16, dtype=torch.int32)}, r"up.qzeros has shape \[2, 16\]"),
        ({"scales": torch.zeros(1, 16).half()}, r"up.scales has shape \[1, 16\]; expected \[2, 16\]"),
        ({"scales": torch.full((2, 16), float("inf"))}, "up: scales has NaN or infinite"),
        ({"bias": torch.zeros(8)}, r"up.bias has shape \[8\]"),
    ],
)
def test_tensors(change, text):
    tensors = {**awq_tensors(random_integers(16, 64, 32, 4)), **change}
    with pytest.raises(ValueError, match=text):
        AwqReader(GOOD).read("up", 64, 16, tensors)


def test_outputs_in_eights():
    with pytest.raises(ValueError, match="up has 12 output features; AWQ stores multiples of 8"):
        AwqReader(GOOD).check("up", 64, 12, {})


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    values=st.dictionaries(
        st.sampled_from(["bits", "group_size", "zero_point", "version", "modules_to_not_convert"]),
        st.one_of(st.none(), st.booleans(), st.integers(-2, 70), st.sampled_from([4, 32, "gemm", 2**70])),
        max_size=2,
    ),
    strange=st.dictionaries(
        st.sampled_from(["qweight", "qzeros", "scales", "bias"]),
        st.tuples(st.lists(st.integers(0, 33), max_size=3), st.sampled_from([torch.int32, torch.half, torch.uint8])),
        max_size=2,
    ),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 70), st.sampled_from([-1, 8, 16, 32])),
)
def test_fuzz(values, strange, sizes):
    n, k, group = 8 * sizes[0], sizes[1], sizes[2]
    weight = random_integers(n, k, group, 4)
    tensors = awq_tensors(weight)
    for suffix, (shape, dtype) in strange.items():
        tensors[suffix] = torch.randint(0, 2, shape).to(dtype)
    try:
        found = AwqReader({"group_size": group, **values}).read("up", k, n, tensors)
    except ValueError as error:
        assert "up" in str(error) or "quantization_config" in str(error)
        return
    assert dense(found, k).shape == (n, k)
    if not strange and "group_size" not in values:
        assert torch.equal(dense(found, k), weight.weight)
