"""AutoRound linears are read exactly in each packing format, with bits and groups of their own per layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_packers import awq_tensors, dense, entries, gptq_tensors, random_integers

from llmrt.llm.checkpoints.auto_round import AutoRoundReader, matches

GOOD = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 32,
    "sym": False,
    "data_type": "int",
    "act_bits": 16,
    "block_name_to_quantize": "model.layers",
    "autoround_version": "0.16.1",
}
#: packing_format -> GPTQ version, or 0 for AWQ.
FORMATS = {
    "auto_round:auto_gptq": 1,
    "auto_round:gptq": 1,
    "auto_round:gptq:exllamav2": 1,
    "auto_gptq": 1,
    "auto": 1,
    None: 1,
    "auto_round": 2,
    "auto_round:exllamav2": 2,
    "auto_round:gptqmodel": 2,
    "auto_round:auto_awq": 0,
    "auto_round:awq": 0,
}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("packing", FORMATS)
def test_values_are_exact(packing, bits):
    version = FORMATS[packing]
    if version == 0 and bits != 4:
        with pytest.raises(ValueError, match=f"{bits} bits in packing_format AWQ; valid: 4"):
            AutoRoundReader({**GOOD, "packing_format": packing, "bits": bits})
        return
    weight = random_integers(32, 96, 32, bits)
    tensors = gptq_tensors(weight, bits, version, g_idx=False) if version else awq_tensors(weight)
    reader = AutoRoundReader({**GOOD, "packing_format": packing, "bits": bits})
    assert reader.quantizes("up", entries(tensors))
    reader.check("up", 96, 32, entries(tensors))
    assert torch.equal(dense(reader.read("up", 96, 32, tensors), 96), weight.weight)


def test_old_writers_say_it_in_backend():
    weight = random_integers(32, 64, 32, 4)
    for backend, tensors in (
        ("auto_round:gptq:exllamav2", gptq_tensors(weight, 4)),
        ("auto_round:awq", awq_tensors(weight)),
        ("auto", gptq_tensors(weight, 4)),
    ):
        values = {**GOOD, "quant_method": "intel/auto-round", "backend": backend}
        assert matches(values)
        assert torch.equal(dense(AutoRoundReader(values).read("up", 64, 32, tensors), 64), weight.weight)
    assert not matches({"quant_method": "gptq"})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("packing", ["auto_round", "auto_round:auto_gptq", "auto_round:auto_awq"])
def test_packers_of_the_package(packing, bits):
    """What AutoRound itself packs, where it is installed."""
    weight = random_integers(64, 96, 32, bits)
    linear = torch.nn.Linear(96, 64)
    linear.weight.data = weight.weight.float()
    scales, zeros = weight.scales.float(), weight.zeros.float()
    if "awq" in packing:
        if bits != 4:
            pytest.skip("AWQ has 4 bits")
        package = pytest.importorskip("auto_round.export.export_to_awq.utils")
        scales, zeros = scales.t().contiguous(), zeros.t().contiguous()
        layer = package.WQLinear_GEMM.from_linear(linear, 4, 32, scales=scales, zeros=zeros, device="cpu")
    else:
        name = "qlinear_torch_zp" if "gptq" in packing else "qlinear_torch"
        package = pytest.importorskip(f"auto_round_extension.torch.{name}")
        layer = package.QuantLinear(bits, 32, 96, 64, True)
        layer.device = torch.device("cpu")
        layer.pack(linear, scales, zeros, None, device="cpu")
    tensors = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales", "bias")}
    found = AutoRoundReader({**GOOD, "packing_format": packing, "bits": bits}).read("up", 96, 64, tensors)
    assert torch.equal(dense(found, 96), weight.weight)
    assert torch.equal(found.bias.float(), linear.bias.half().float())


def test_layers_of_their_own():
    extra = {
        "model.layers.0.mlp.gate": {"bits": 8, "group_size": -1, "sym": True},
        r".*\.1\.mlp.*": {"bits": 2, "group_size": 64, "data_type": "int"},
        "lm_head": {"bits": 16},
    }
    reader = AutoRoundReader({**GOOD, "packing_format": "auto_round", "extra_config": extra})
    for name, bits, group in (
        ("model.layers.0.mlp.gate", 8, -1),
        ("model.layers.0.mlp.gate_proj", 4, 32),
        ("model.layers.1.mlp.gate_proj", 2, 64),
        ("model.layers.11.mlp.gate_proj", 4, 32),
    ):
        weight = random_integers(32, 128, group, bits)
        found = reader.read(name, 128, 32, gptq_tensors(weight, bits, 2, g_idx=False))
        assert torch.equal(dense(found, 128), weight.weight)
    assert reader.grouping("lm_head") is None
    assert not reader.quantizes("lm_head", entries({"weight": torch.zeros(8, 32)}))
    with pytest.raises(ValueError, match=r"lm_head.qweight is there although .*extra_config excludes lm_head"):
        reader.check("lm_head", 128, 32, entries(gptq_tensors(weight, 4)))


def test_exclusions_of_the_other_formats():
    values = {"modules_to_not_convert": ["lm_head"], "dynamic": {r"-:.*\.gate$": {}, r"+:.*down": {"bits": 8}}}
    reader = AutoRoundReader({**GOOD, **values})
    assert reader.grouping("lm_head") is None and reader.grouping("layers.0.gate") is None
    assert reader.grouping("layers.0.down").bits == 8 and reader.grouping("layers.0.up").bits == 4


@pytest.mark.parametrize(
    "values, text",
    [
        ({"packing_format": "auto_round:llm_compressor"}, "packing_format is 'auto_round:llm_compressor'; readable"),
        ({"packing_format": "auto_round:fp8_static"}, "packing_format is"),
        ({"packing_format": 1}, "packing_format is 1"),
        ({"data_type": "mx_fp"}, "data_type is 'mx_fp'; readable: int"),
        ({"act_bits": 8}, "act_bits is 8; readable: 16"),
        ({"rotation_config": {"kind": "hadamard"}}, "rotation_config is"),
        ({"bits": 6}, "bits is 6"),
        ({"extra_config": {"up": {"bits": 5}}}, r"bits \(of extra_config\) is 5"),
        ({"extra_config": {"up": {"act_bits": 4}}}, "act_bits is 4"),
        ({"extra_config": {"up": 4}}, "extra_config has 'up': 4"),
        ({"extra_config": {"*": {"bits": 4}}}, "no regular expression"),
    ],
)
def test_configurations(values, text):
    with pytest.raises(ValueError, match=text):
        AutoRoundReader({**GOOD, **values})


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    values=st.dictionaries(
        st.sampled_from(["bits", "group_size", "sym", "packing_format", "extra_config", "data_type", "act_bits"]),
        st.one_of(
            st.none(),
            st.integers(-1, 40),
            st.sampled_from([*FORMATS, "int", 16]),
            st.dictionaries(st.sampled_from(["up", ".*", "("]), st.fixed_dictionaries({"bits": st.integers(2, 16)})),
        ),
        max_size=2,
    ),
    strange=st.dictionaries(
        st.sampled_from(["qweight", "qzeros", "scales", "g_idx", "bias"]),
        st.tuples(st.lists(st.integers(0, 33), max_size=2), st.sampled_from([torch.int32, torch.half, torch.uint8])),
        max_size=1,
    ),
    awq=st.booleans(),
    bits=st.sampled_from([2, 3, 4, 8]),
)
def test_fuzz(values, strange, awq, bits):
    weight = random_integers(16, 64, 32, 4 if awq else bits)
    tensors = awq_tensors(weight) if awq else gptq_tensors(weight, bits, 2)  # "auto_round" alone: zeros as they are
    for suffix, (shape, dtype) in strange.items():
        tensors[suffix] = torch.randint(0, 2, shape).to(dtype)
    packing = "auto_round:auto_awq" if awq else "auto_round"
    try:
        reader = AutoRoundReader({**GOOD, "packing_format": packing, "bits": 4 if awq else bits, **values})
        found = reader.read("up", 64, 16, tensors)
    except ValueError as error:
        assert "up" in str(error) or "quantization_config" in str(error)
        return
    assert dense(found, 64).shape == (16, 64)
    if not strange and not values.keys() & {"packing_format", "extra_config", "group_size"}:
        assert torch.equal(dense(found, 64), weight.weight)
