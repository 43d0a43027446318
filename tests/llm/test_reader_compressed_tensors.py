import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmrt.llm.checkpoints.compressed_tensors import CompressedTensorsReader, matches
from llmrt.llm.checkpoints.reader import Entry
from llmrt.ops.formats import dequantize

NAME = "model.layers.0.self_attn.q_proj"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def config(form="pack-quantized", **weights):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


def packed(values: Tensor, bits: int) -> Tensor:
    """Return rows of signed integers as int32 words: every row is one long number, offset binary, lowest field first."""
    rows = []
    for row in values.tolist():
        number = sum((value + (1 << (bits - 1))) << (i * bits) for i, value in enumerate(row))
        size = -(-len(row) * bits // 32) * 4
        rows.append(torch.frombuffer(bytearray(number.to_bytes(size, "little")), dtype=torch.int32))
    return torch.stack(rows)


class Stored:
    """A random linear as compressed-tensors saves it, and the weight it stands for."""

    def __init__(self, n, k, form, bits, symmetric, columns, dtype=torch.float32, rows=1, order=False, tensor=False):
        self.n, self.k = n, k
        self.columns = columns = k if columns == -1 else columns
        blocks = (1, 1) if tensor else (-(-n // rows), -(-k // columns))
        scale = (0.01 + torch.rand(blocks)).to(dtype)
        zero = torch.zeros(blocks, dtype=torch.int64)
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        if not symmetric:
            zero = torch.randint(low, high + 1, blocks)
            zero.view(-1)[0], zero.view(-1)[-1] = low, high
        if form == "float-quantized":
            codes = (torch.randn(n, k) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
        else:
            codes = torch.randint(low, high + 1, (n, k)).to(torch.int8)
        self.index = torch.arange(k) // columns
        if order:
            self.index = self.index[torch.randperm(k)]
        at = torch.zeros(n, dtype=torch.long) if tensor else torch.arange(n) // rows
        self.weight = (codes.float() - zero[at][:, self.index]) * scale.float()[at][:, self.index]
        self.tensors = {"weight_scale": scale.reshape(()) if tensor else scale}
        if form == "pack-quantized":
            self.tensors |= {"weight_packed": packed(codes, bits), "weight_shape": torch.tensor([n, k])}
        else:
            self.tensors["weight"] = codes
        if not symmetric:
            pack = form == "pack-quantized" and not tensor
            self.tensors["weight_zero_point"] = packed(zero.t(), bits).t().contiguous() if pack else zero.to(torch.int8)
        if order:
            self.tensors["weight_g_idx"] = self.index.int()


def entries(tensors):
    return {key: Entry(tuple(t.shape), t.dtype) for key, t in tensors.items()}


def read(stored, settings_):
    reader = CompressedTensorsReader(settings_)
    assert reader.quantizes(NAME, entries(stored.tensors))
    reader.check(NAME, stored.k, stored.n, entries(stored.tensors))
    return reader.read(NAME, stored.k, stored.n, stored.tensors)


def value(weight, k):
    result = dequantize(*weight.canonical, weight.layout, k)
    return result if weight.perm is None else result[:, weight.perm.long().argsort()]


SHAPES = [(33, 96, 32), (5, 72, 32), (7, 31, 32), (3, 130, 64), (16, 2048, 1024), (9, 41, -1), (1, 64, 128)]


@pytest.mark.parametrize("n, k, columns", SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed(n, k, columns, bits, symmetric):
    dtype = FLOATS[n % 3]
    stored = Stored(n, k, "pack-quantized", bits, symmetric, columns, dtype)
    strategy = {"strategy": "channel"} if columns == -1 else {"group_size": columns}
    weight = read(stored, config(num_bits=bits, symmetric=symmetric, **strategy))
    group = "channel" if columns == -1 else f"g{columns}"
    scheme = "sym" if symmetric else "asym"
    assert str(weight.layout).startswith(f"int{max(bits, 4)}_{scheme}_{group}_") and weight.layout.scale_dtype == dtype
    assert torch.equal(value(weight, k), stored.weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "columns, rows, strategy", [(-1, 1, "channel"), (32, 1, "group"), (-1, -1, "tensor"), (16, 8, "block")]
)
def test_integers_as_they_are(symmetric, columns, rows, strategy):
    n, k = 19, 88
    stored = Stored(n, k, "int-quantized", 8, symmetric, columns, rows=max(rows, 1), tensor=strategy == "tensor")
    sizes = {"group": {"group_size": 32}, "block": {"group_size": None, "block_structure": [8, 16]}}
    options = {"strategy": strategy, "group_size": None, **sizes.get(strategy, {})}
    for form in ("int-quantized", "naive-quantized"):
        assert torch.equal(
            value(read(stored, config(form, num_bits=8, symmetric=symmetric, **options)), k), stored.weight
        )


@pytest.mark.parametrize(
    "strategy, columns, rows", [("channel", -1, 1), ("tensor", -1, 1), ("group", 32, 1), ("block", 16, 8)]
)
def test_floats(strategy, columns, rows):
    n, k = 21, 70
    stored = Stored(n, k, "float-quantized", 8, True, columns, torch.bfloat16, rows, tensor=strategy == "tensor")
    sizes = {"group": {"group_size": 32}, "block": {"block_structure": [8, 16]}}.get(strategy, {})
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "group_size": None, **sizes}
    weight = read(stored, config("float-quantized", **weights))
    group = "channel" if columns == -1 else f"g{columns}"
    assert str(weight.layout) == f"fp8_e4m3_sym_{group}_bf16"
    assert torch.equal(value(weight, k), stored.weight)


@pytest.mark.parametrize("form, bits", [("pack-quantized", 4), ("pack-quantized", 8), ("int-quantized", 8)])
def test_act_order(form, bits):
    stored = Stored(6, 80, form, bits, False, 32, order=True)
    weight = read(stored, config(form, num_bits=bits, symmetric=False))
    assert weight.perm.dtype == torch.int32 and sorted(weight.perm.tolist()) == list(range(80))
    assert torch.equal(value(weight, 80), stored.weight)
    x = torch.randn(3, 80).double()
    product = x[:, weight.perm.long()] @ dequantize(*weight.canonical, weight.layout, 80).t().double()
    torch.testing.assert_close(product, x @ stored.weight.t().double())


def test_unused_act_order():
    stored = Stored(4, 64, "pack-quantized", 4, True, 32)
    for index in (torch.arange(64).int() // 32, torch.full((64,), -1, dtype=torch.int32)):
        stored.tensors["weight_g_idx"] = index
        weight = read(stored, config())
        assert weight.perm is None and torch.equal(value(weight, 64), stored.weight)


def test_targets_and_ignored():
    settings_ = config()
    other = {"targets": ["re:.*down_proj$", NAME], "weights": {"num_bits": 8, "strategy": "channel", "type": "int"}}
    settings_["config_groups"]["group_1"] = {**other, "format": "int-quantized"}
    settings_["ignore"] += ["re:.*layers[.]1[.].*"]
    reader = CompressedTensorsReader(settings_)
    assert matches(settings_) and not matches({"quant_method": "gptq"})
    assert [reader.scheme_of(n).bits for n in (NAME, "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj")] == [
        8,
        8,
        4,
    ]
    assert reader.scheme_of("lm_head") is reader.scheme_of("model.layers.1.mlp.down_proj") is None
    assert not reader.quantizes("lm_head", {"weight": Entry((4, 8), torch.bfloat16)})
    with pytest.raises(ValueError, match="lm_head is quantized in the checkpoint, but no group"):
        reader.check("lm_head", 64, 4, entries(Stored(4, 64, "pack-quantized", 4, True, 32).tensors))


def test_bias_and_quantized_activations():
    stored = Stored(4, 64, "pack-quantized", 4, True, 32)
    stored.tensors["bias"] = torch.randn(4)
    settings_ = config()
    settings_["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True, "strategy": "token"}
    with pytest.warns(UserWarning, match="input_activations: not used, only weights"):
        weight = read(stored, settings_)
    assert torch.equal(weight.bias, stored.tensors["bias"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "marlin-24"}, "has format 'marlin-24'.*readable: pack-quantized"),
        ({"format": ["x"]}, "which cannot be read"),
        ({"format": "dense"}, "which cannot be read"),
        ({"config_groups": {}}, "config_groups is {}"),
        ({"config_groups": {"W4A16": ["Linear"]}}, r"config_groups\['W4A16'\] is"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config is"),
        ({"ignore": "lm_head"}, "ignore is 'lm_head'"),
        ({"ignore": ["re:(a+)+$"]}, "valid: up to 4 repetitions, none of a group"),
        ({"ignore": ["re:" + ".*" * 9]}, "up to 4 repetitions"),
        ({"ignore": ["re:["]}, "unterminated character set"),
    ],
)
def test_refused_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        CompressedTensorsReader({**config(), **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_bits": 3}, "num_bits 3, which cannot be read; readable: pack-quantized"),
        ({"num_bits": True}, "which cannot be read"),
        ({"type": "float"}, "type 'float'"),
        ({"strategy": "tensor_group", "group_size": 16}, "has strategy 'tensor_group'"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": 1 << 62}, "group with a group_size of 8 or more"),
        ({"group_size": "128"}, "group_size '128'"),
        ({"symmetric": "no"}, "has symmetric 'no'"),
    ],
)
def test_refused_weights(change, message):
    with pytest.raises(ValueError, match=message):
        CompressedTensorsReader(config(**change))


DAMAGE = [
    ("weight_packed", lambda t: None, "the checkpoint has no .*weight_packed; it has"),
    ("weight_packed", lambda t: t[:, :-1], r"weight_packed has shape \[6, 9\]; expected \[6, 10\]"),
    ("weight_packed", lambda t: t.long(), "weight_packed has dtype int64; valid: int32"),
    ("weight_scale", lambda t: t[:, :-1], r"weight_scale has shape \[6, 2\]; expected \[6, 3\]"),
    ("weight_scale", lambda t: t.double(), "weight_scale has dtype float64; valid: float32, bfloat16, float16"),
    ("weight_scale", lambda t: t.fill_(float("nan")), "weight_scale has NaN"),
    ("weight_scale", lambda t: t * float("inf"), "weight_scale has NaN or infinite"),
    ("weight_zero_point", lambda t: None, "has no .*weight_zero_point"),
    ("weight_zero_point", lambda t: t[:0], r"weight_zero_point has shape \[0, 3\]; expected \[1, 3\]"),
    ("weight_shape", lambda t: t * -1, r"weight_shape is \[-6, -80\]; expected \[6, 80\]"),
    ("weight_shape", lambda t: t << 40, "weight_shape is"),
    ("weight_g_idx", lambda t: t - 1, "weight_g_idx has values -1 .. 1; valid: 0 .. 2"),
    ("weight_g_idx", lambda t: t + 1000, "weight_g_idx has values 1000 .. 1002; valid: 0 .. 2"),
    ("weight_g_idx", lambda t: t * 0, "gives group 0 80 inputs; expected group_size = 32"),
    ("weight_g_idx", lambda t: t[1:], r"weight_g_idx has shape \[79\]; expected \[80\]"),
    ("bias", lambda t: torch.zeros(7), r"bias has shape \[7\]; expected \[6\]"),
]


@pytest.mark.parametrize("suffix, change, message", DAMAGE)
def test_damaged_linears(suffix, change, message):
    stored = Stored(6, 80, "pack-quantized", 4, False, 32, order=True)
    stored.tensors["bias"] = torch.zeros(6)
    damaged = change(stored.tensors.pop(suffix))
    if damaged is not None:
        stored.tensors[suffix] = damaged
    reader = CompressedTensorsReader(config(symmetric=False))
    with pytest.raises(ValueError, match=message):
        reader.read(NAME, 80, 6, stored.tensors)


def test_damaged_values():
    integers = Stored(6, 80, "int-quantized", 8, True, -1)
    integers.tensors["weight_zero_point"] = torch.ones(6, 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="weight_zero_point is not 0"):
        read(integers, config("int-quantized", num_bits=8, strategy="channel", group_size=None))
    integers.tensors["weight_zero_point"] = torch.full((6, 1), 1000)
    with pytest.raises(ValueError, match="weight_zero_point has the value 1000; valid: -128 to 127"):
        read(integers, config("int-quantized", num_bits=8, strategy="channel", group_size=None, symmetric=False))
    floats = Stored(6, 80, "float-quantized", 8, True, -1)
    floats.tensors["weight"].view(torch.uint8)[3, 5] = 0x7F
    with pytest.raises(ValueError, match="weight has NaN"):
        read(floats, config("float-quantized", num_bits=8, type="float", strategy="channel", group_size=None))
    frozen = {"weight": torch.zeros(6, 80), "weight_scale": torch.ones(6, 1)}
    reader = CompressedTensorsReader(config("int-quantized", num_bits=8, strategy="channel", group_size=None))
    assert reader.quantizes(NAME, entries(frozen))
    with pytest.raises(ValueError, match="weight has dtype float32; valid: int8"):
        reader.check(NAME, 80, 6, entries(frozen))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 64), 1 << 64) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLACES = st.sampled_from(
    ["format", "config_groups", "ignore", "targets", "weights", "num_bits", "group_size", "strategy"]
)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(
    PLACES,
    JSON,
    st.sampled_from(["weight_packed", "weight_scale", "weight_zero_point"]),
    st.lists(st.integers(0, 300), max_size=3),
)
def test_any_values(place, anything, suffix, shape):
    settings_ = config(symmetric=False)
    group = settings_["config_groups"]["group_0"]
    holder = next((d for d in (settings_, group, group["weights"]) if place in d), settings_)
    holder[place] = anything
    stored = Stored(6, 80, "pack-quantized", 4, False, 32)
    try:
        read(stored, settings_)
    except ValueError as error:
        assert re.search("config_groups|ignore|weight|readable", str(error))
    stored.tensors[suffix] = torch.zeros(shape, dtype=stored.tensors[suffix].dtype)
    reader = CompressedTensorsReader(config(symmetric=False))
    try:
        reader.read(NAME, 80, 6, stored.tensors)
    except ValueError as error:
        assert suffix in str(error)
