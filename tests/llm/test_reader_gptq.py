"""GPTQ linears are read exactly, whatever the version, bits, groups and order; wrong ones are refused by name."""

from __future__ import annotations

import pytest
import torch
from integer_packers import dense, entries, gptq_tensors, pack_rows, random_integers, shuffled

from llmrt import ops
from llmrt.llm.checkpoints.gptq import GptqReader, matches


def config(**values):
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, **values}


def read(values, tensors, k, n, name="model.layers.0.mlp.up_proj"):
    reader = GptqReader(values)
    assert reader.quantizes(name, entries(tensors))
    reader.check(name, k, n, entries(tensors))
    return reader.read(name, k, n, tensors)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "n, k, group", [(32, 64, 32), (40, 96, -1), (7, 45, 32), (33, 100, 64), (8, 32, 1024), (1, 8, 8)]
)
def test_values_are_exact(version, symmetric, bits, n, k, group):
    weight = random_integers(n, k, group, bits, symmetric)
    kind = {1: "gptq", 2: "gptq_v2"}[version]
    values = config(bits=bits, group_size=group, sym=symmetric, checkpoint_format=kind)
    found = read(values, gptq_tensors(weight, bits, version), k, n)
    assert torch.equal(dense(found, k), weight.weight)
    assert found.perm is None and found.bias is None
    assert found.layout.weight_dtype == ("int8" if bits == 8 else "int4")
    # two and three bits fit around the zero of int4, so that no zeros are kept
    assert found.layout.asymmetric == (not symmetric and bits >= 4)


@pytest.mark.parametrize("group", [32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_groups_and_scale_dtypes(group, dtype):
    weight = random_integers(8, 1024, group, 4, dtype=dtype)
    found = read(config(group_size=group), gptq_tensors(weight, 4), 1024, 8)
    assert torch.equal(dense(found, 1024), weight.weight)
    assert found.layout.scale_dtype == dtype
    assert found.layout.group_size == (-1 if group == 1024 else group)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_version_1_adds_one_without_a_carry(bits):
    top = (1 << bits) - 1
    weight = random_integers(32, 32, 32, bits)
    stored = torch.full((32, 1), top)
    stored[1::2] = 3  # neighbours of the fields that overflow
    tensors = {**gptq_tensors(weight, bits), "qzeros": pack_rows(stored.t(), bits)}
    found = read(config(bits=bits), tensors, 32, 32)
    assert torch.equal(dense(found, 32), weight._replace(zeros=stored + 1).weight)


def test_zero_points_of_15_in_both_versions():
    weight = random_integers(16, 64, 32, 4, zero=(15, 15))
    for version, kind in ((1, "gptq"), (2, "gptq_v2")):
        found = read(config(checkpoint_format=kind), gptq_tensors(weight, 4, version), 64, 16)
        assert torch.equal(dense(found, 64), weight.weight)


@pytest.mark.parametrize("compute, bound", [("fp32", 1e-6), ("fp16", 1e-3), ("bf16", 2e-3), ("int8", 1e-2)])
def test_kernels_take_a_zero_of_16(compute, bound):
    weight = random_integers(32, 128, 32, 4, zero=(16, 16))
    weight.zeros[::3] = 5
    found = read(config(sym=False), gptq_tensors(weight, 4), 128, 32)
    codes, scales, zeros = found.canonical
    packed = ops.pack_weight(codes, scales, zeros, str(found.layout), 128)
    x = torch.randn(3, 128)
    result = ops.quant_linear(x, packed, None, None, str(found.layout), 32, compute)
    exact, most = x.double() @ weight.weight.T, x.double().abs() @ weight.weight.abs().T
    assert float(((result - exact).abs() / most).max()) < bound


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptqmodel_borrows_are_undone(bits):
    """GPTQModel makes version 1 by one subtraction per word: a zero of 0 borrows from its neighbour."""
    weight = random_integers(32, 32, 32, bits, zero=(0, (1 << bits) - 1))
    weight.zeros[::3] = 0
    tensors = gptq_tensors(weight, bits, 2)
    ones = sum(1 << i for i in range(0, 32, bits))
    words = (tensors["qzeros"].long() - ones) & 0xFFFFFFFF
    tensors["qzeros"] = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    values = config(bits=bits, sym=False, meta={"quantizer": ["gptqmodel:1.4.0"]})
    assert torch.equal(dense(read(values, tensors, 32, 32), 32), weight.weight)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("k, group", [(96, 32), (100, 32), (64, -1)])
def test_act_order_sorts_columns(bits, k, group):
    weight = shuffled(random_integers(16, k, group, bits))
    found = read(config(bits=bits, group_size=group, desc_act=True), gptq_tensors(weight, bits), k, 16)
    assert torch.equal(dense(found, k), weight.weight)
    assert (found.perm is None) == (group == -1)
    x = torch.randn(3, k, dtype=torch.float64)
    if found.perm is not None:
        columns = dense(found._replace(perm=None), k)
        torch.testing.assert_close(x[..., found.perm.long()] @ columns.T, x @ weight.weight.T)


def test_trivial_orders_have_no_perm():
    weight = random_integers(16, 96, 32, 4)
    tensors = gptq_tensors(weight, 4)
    for g_idx in (weight.groups.int(), torch.zeros(96, dtype=torch.int32), weight.groups.long(), None):
        part = {key: t for key, t in tensors.items() if key != "g_idx"}
        found = read(config(), part if g_idx is None else {**part, "g_idx": g_idx}, 96, 16)
        assert found.perm is None
        assert torch.equal(dense(found, 96), weight.weight)


def test_groups_that_changed_places_move_scales():
    weight = random_integers(16, 96, 32, 4)
    weight = weight._replace(groups=torch.tensor([2, 0, 1])[weight.groups])
    found = read(config(), gptq_tensors(weight, 4), 96, 16)
    assert found.perm is None
    assert torch.equal(dense(found, 96), weight.weight)


def test_bias_and_names_of_formats():
    weight = random_integers(16, 64, 32, 4, symmetric=True)
    bias = torch.randn(16, dtype=torch.float16)
    tensors = {**gptq_tensors(weight, 4, 2), "bias": bias}
    for values in (config(checkpoint_format="gptq_v2"), config(format="gptq_v2"), config(checkpoint_format="gptq_p")):
        found = read(values, tensors, 64, 16)
        assert torch.equal(found.bias, bias)
        assert str(found.layout) == "int4_sym_g32_f16"
    del tensors["qzeros"]
    assert torch.equal(dense(read(config(), tensors, 64, 16), 64), weight.weight)


@pytest.mark.parametrize("word", ["int8", "int16", "int64"])
def test_other_words(word):
    dtype = getattr(torch, word)
    weight = random_integers(16, 64, 32, 4)
    tensors = {
        **gptq_tensors(weight, 4),
        "qweight": pack_rows(weight.codes, 4, dtype).t().contiguous(),
        "qzeros": pack_rows(weight.zeros.t() - 1, 4, dtype),
    }
    assert torch.equal(dense(read(config(pack_dtype=word), tensors, 64, 16), 64), weight.weight)


def test_dynamic_overrides_and_excludes():
    dynamic = {
        r"-:.*\.0\..*": {},
        r"+:.*\.mlp\..*": {"bits": 8, "group_size": 64},
        r".*\.attn\.q": {"group_size": -1, "sym": False},
    }
    reader = GptqReader(config(dynamic=dynamic))
    assert reader.grouping("layers.0.mlp.up") is None
    assert not reader.quantizes("layers.0.mlp.up", {"weight": None, "qweight": None})
    assert reader.grouping("layers.1.mlp.up").bits == 8
    for name, bits, group in (("layers.1.mlp.up", 8, 64), ("layers.1.attn.q", 4, -1), ("layers.1.attn.k", 4, 32)):
        weight = random_integers(16, 128, group, bits)
        found = reader.read(name, 128, 16, gptq_tensors(weight, bits))
        assert torch.equal(dense(found, 128), weight.weight)
    with pytest.raises(ValueError, match=r"layers.0.mlp.up.qweight is there although .*dynamic excludes"):
        reader.check("layers.0.mlp.up", 128, 16, entries(gptq_tensors(weight, 4)))


def test_matches_and_floating_linears():
    assert matches({"quant_method": "gptq"}) and not matches({"quant_method": "awq"})
    weight = random_integers(8, 32, 32, 4)
    reader = GptqReader(config(lm_head=True))
    assert not reader.quantizes("lm_head", entries({"weight": torch.zeros(8, 32)}))
    assert reader.quantizes("lm_head", entries(gptq_tensors(weight, 4)))


def test_configurations_do_not_leak():
    first, second = GptqReader(config(desc_act=True)), GptqReader(config())
    weight = random_integers(8, 64, 32, 4)
    tensors = gptq_tensors(weight, 4, g_idx=False)
    with pytest.raises(ValueError, match=r"the checkpoint has no up.g_idx"):
        first.check("up", 64, 8, entries(tensors))
    second.check("up", 64, 8, entries(tensors))
