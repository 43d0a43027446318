"""GPTQ files of strangers: errors that name the tensor, never another exception and never a wrong weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_packers import dense, entries, gptq_tensors, random_integers, shuffled

from llmrt.llm.checkpoints.gptq import GptqReader

GOOD = {"quant_method": "gptq", "bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    "values, text",
    [
        ({"bits": 5}, "bits is 5; valid: 2, 3, 4, 8"),
        ({"bits": "4"}, "bits is '4'"),
        ({"bits": True}, "bits is True"),
        ({"group_size": 0}, "group_size is 0; valid: -1"),
        ({"group_size": 2.5}, "group_size is 2.5"),
        ({"sym": "yes"}, "sym is 'yes'; valid: true, false"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; readable: gptq, gptq_v2"),
        ({"checkpoint_format": 2}, "checkpoint_format is 2; expected a text"),
        ({"is_marlin_format": True}, "'marlin'"),
        ({"pack_dtype": "float32"}, "pack_dtype is 'float32'; valid: int8"),
        ({"bits": 3, "checkpoint_format": "gptq_p"}, "3 bits are read from int32 words"),
        ({"dynamic": ["q_proj"]}, "dynamic is"),
        ({"dynamic": {"+:(": {}}}, "no regular expression"),
        ({"dynamic": {"(a+)+$": {}}}, "could take long"),
        ({"dynamic": {"q": {"bits": 16}}}, r"bits \(dynamic 'q'\) is 16"),
        ({"meta": {"quantizer": [3]}}, "quantizer has 3"),
    ],
)
def test_configurations(values, text):
    with pytest.raises(ValueError, match=text):
        GptqReader({**GOOD, **values})


def good():
    return gptq_tensors(random_integers(16, 64, 32, 4), 4)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"qweight": torch.zeros(16, 8, dtype=torch.int32)}, r"up.qweight has shape \[16, 8\]; expected \[8, 16\]"),
        ({"qweight": torch.zeros(8, 16, dtype=torch.int64)}, "up.qweight has dtype int64; valid: int32"),
        ({"qweight": torch.zeros(8, 16)}, "up.qweight has dtype float32"),
        ({"qzeros": torch.zeros(2, 1, dtype=torch.int32)}, r"up.qzeros has shape \[2, 1\]; expected \[2, 2\]"),
        ({"scales": torch.zeros(16, 2).half()}, r"up.scales has shape \[16, 2\]; expected \[2, 16\]"),
        (
            {"scales": torch.zeros(2, 16, dtype=torch.int32)},
            "up.scales has dtype int32; valid: float32, bfloat16, float16",
        ),
        ({"scales": None}, "the checkpoint has no up.scales; it has g_idx, qweight, qzeros"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, r"up.g_idx has shape \[63\]; expected \[64\]"),
        ({"g_idx": torch.zeros(64)}, "up.g_idx has dtype float32"),
        ({"bias": torch.zeros(15)}, r"up.bias has shape \[15\]"),
    ],
)
def test_shapes_and_dtypes(change, text):
    tensors = {key: t for key, t in {**good(), **change}.items() if t is not None}
    for act in (
        lambda reader: reader.check("up", 64, 16, entries(tensors)),
        lambda reader: reader.read("up", 64, 16, tensors),
    ):
        with pytest.raises(ValueError, match=text):
            act(GptqReader(GOOD))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, r"up.g_idx has values -1 .. -1; valid: 0 .. 1"),
        ({"g_idx": torch.full((64,), 2**31 - 1, dtype=torch.int32)}, "up.g_idx has values 2147483647"),
        ({"g_idx": (torch.arange(64) % 3 == 0).int()}, "up.g_idx gives group 0 42 inputs; expected group_size = 32"),
        ({"scales": torch.full((2, 16), float("nan")).half()}, "up: scales has NaN or infinite values, 32 of 32"),
        ({"scales": torch.full((2, 16), float("inf"))}, "up: scales has NaN"),
        ({"bias": torch.full((16,), float("nan"))}, "up.bias has NaN or infinite values, 16"),
    ],
)
def test_values(change, text):
    with pytest.raises(ValueError, match=text):
        GptqReader(GOOD).read("up", 64, 16, {**good(), **change})


def test_eight_bit_zero_of_256_does_not_fit():
    tensors = gptq_tensors(random_integers(16, 64, 32, 8), 8)
    tensors["qzeros"][:] = -1
    with pytest.raises(ValueError, match=r"up: zero points are 256 .. 256; valid: 0 .. 255"):
        GptqReader({**GOOD, "bits": 8, "sym": False}).read("up", 64, 16, tensors)


def test_sizes_beyond_memory_are_refused_by_shape():
    with pytest.raises(ValueError, match=r"up.qweight has shape \[8, 16\]; expected \[576460752303423488, 16\]"):
        GptqReader({**GOOD, "group_size": 2**62}).read("up", 2**62, 16, good())


NUMBERS = st.one_of(st.none(), st.booleans(), st.integers(-2, 130), st.sampled_from([2, 3, 4, 8, 32, "4", 2**70, 0.5]))
SHAPES = st.lists(st.integers(0, 33), min_size=0, max_size=3)
DTYPES = st.sampled_from([torch.int32, torch.int64, torch.float16, torch.float32, torch.uint8, torch.bool])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    values=st.dictionaries(
        st.sampled_from(["bits", "group_size", "sym", "desc_act", "dynamic", "pack_dtype", "checkpoint_format"]),
        NUMBERS,
        max_size=3,
    ),
    strange=st.dictionaries(
        st.sampled_from(["qweight", "qzeros", "scales", "g_idx", "bias"]), st.tuples(SHAPES, DTYPES), max_size=2
    ),
    bits=st.sampled_from([2, 3, 4, 8]),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 70), st.sampled_from([-1, 8, 16, 32])),
    seed=st.integers(0, 1000),
)
def test_fuzz(values, strange, bits, sizes, seed):
    torch.manual_seed(seed)
    n, k, group = sizes
    weight = random_integers(n, k, group, bits)
    weight = shuffled(weight) if seed % 2 else weight
    tensors = gptq_tensors(weight, bits)
    for suffix, (shape, dtype) in strange.items():
        tensors[suffix] = torch.randint(0, 2, shape).to(dtype)
    try:
        reader = GptqReader({"bits": bits, "group_size": group, **values})
        found = reader.read("up", k, n, tensors)
    except ValueError as error:
        assert "up" in str(error) or "quantization_config" in str(error)
        return
    assert dense(found, k).shape == (n, k)
    if not strange:
        assert torch.equal(dense(found, k), weight.weight), "g_idx tells the groups, whatever the configuration says"
