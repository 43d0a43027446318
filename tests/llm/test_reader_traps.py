"""What readers of quantized linears must not fall for: tables they would ignore, sizes nobody checks, patterns that never end."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_packers import awq_tensors, dense, gptq_tensors, random_integers
from torch import Tensor

from llmrt.llm.checkpoints.auto_round import AutoRoundReader
from llmrt.llm.checkpoints.compressed_tensors import CompressedTensorsReader
from llmrt.llm.checkpoints.fp8_blocks import Fp8BlocksReader
from llmrt.llm.checkpoints.gptq import GptqReader
from llmrt.llm.checkpoints.int8_rows import Int8RowsReader
from llmrt.llm.checkpoints.low_precision import LowPrecisionReader

NAME = "model.layers.0.mlp.up_proj"


def compressed(form: str = "float-quantized", **weights: object) -> CompressedTensorsReader:
    floating = form == "float-quantized"
    weights = {"num_bits": 8, "type": "float" if floating else "int", "strategy": "group", "group_size": 8, **weights}
    groups = {"g": {"targets": ["Linear"], "weights": weights}}
    return CompressedTensorsReader({"quant_method": "compressed-tensors", "format": form, "config_groups": groups})


def codes(n: int, k: int, floating: bool) -> Tensor:
    return torch.randn(n, k).to(torch.float8_e4m3fn) if floating else torch.randint(-128, 128, (n, k), dtype=torch.int8)


@pytest.mark.parametrize("form", ["float-quantized", "int-quantized"])
@pytest.mark.parametrize("order", ["columns", "whole groups"])
def test_a_table_of_groups_belongs_to_every_kind_of_code(form: str, order: str) -> None:
    weight, scale = codes(3, 32, form == "float-quantized"), torch.rand(3, 4) + 0.1
    groups = torch.arange(32) // 8
    groups = groups[torch.randperm(32)] if order == "columns" else 3 - groups
    tensors = {"weight": weight, "weight_scale": scale, "weight_g_idx": groups.int()}
    found = compressed(form, actorder="group").read(NAME, 32, 3, tensors)
    assert (found.perm is not None) == (order == "columns")
    assert torch.equal(dense(found, 32), weight.double() * scale.double()[:, groups])


@pytest.mark.parametrize("actorder", ["group", True, "dynamic"])
def test_act_order_without_its_table(actorder: object) -> None:
    tensors = {"weight": codes(3, 32, True), "weight_scale": torch.rand(3, 4)}
    with pytest.raises(ValueError, match=r"the checkpoint has no .*up_proj.weight_g_idx"):
        compressed(actorder=actorder).read(NAME, 32, 3, tensors)
    compressed(actorder="weight").read(NAME, 32, 3, tensors)
    with pytest.raises(ValueError, match=r"has actorder 1; valid: None, False, True, 'group'"):
        compressed(actorder=1)


def test_an_empty_table_of_gptq() -> None:
    """All zero is nobody's order, but with desc_act it cannot be told what order was meant."""
    weight = random_integers(16, 64, 32, 4)
    tensors = {**gptq_tensors(weight, 4), "g_idx": torch.zeros(64, dtype=torch.int32)}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    assert torch.equal(dense(GptqReader(config).read("up", 64, 16, tensors), 64), weight.weight)
    with pytest.raises(ValueError, match=r"up.g_idx gives group 0 64 inputs; expected group_size = 32 each"):
        GptqReader({**config, "desc_act": True}).read("up", 64, 16, tensors)


TABLES = st.one_of(
    st.lists(st.integers(-1, 3), min_size=20, max_size=20),
    st.permutations([0] * 8 + [1] * 8 + [2] * 4),
    st.permutations([0, 1, 2]).map(lambda order: [order[i // 8] for i in range(20)]),
    st.integers(-1, 3).map(lambda group: [group] * 20),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(TABLES, st.booleans(), st.sampled_from([2, 3, 4, 8]))
def test_any_table_is_taken_exactly_or_refused(table: list[int], ordered: bool, bits: int) -> None:
    weight = random_integers(4, 20, 8, bits)
    index = torch.tensor(table)
    unused = set(table) == {0} and not ordered
    expected = weight if unused else weight._replace(groups=index)
    tensors = {**gptq_tensors(weight, bits), "g_idx": index.int()}
    config = {"quant_method": "gptq", "bits": bits, "group_size": 8, "desc_act": ordered}
    try:
        found = GptqReader(config).read("up", 20, 4, tensors)
    except ValueError as error:
        assert (
            "up.g_idx" in str(error)
            and not unused
            and (min(table) < 0 or sorted(table) != sorted(weight.groups.tolist()))
        )
        return
    assert torch.equal(dense(found, 20), expected.weight)
    words = {
        "weight_packed": tensors["qweight"].t().contiguous(), "weight_scale": weight.scales, "weight_g_idx": index.int(),
        "weight_zero_point": gptq_tensors(weight, bits, 2)["qzeros"].t().contiguous(),
    }  # fmt: skip
    if bits != 3 and not unused:
        reader = compressed("pack-quantized", num_bits=bits, symmetric=False, actorder="group")
        assert torch.equal(dense(reader.read(NAME, 20, 4, words), 20), expected.weight)


@pytest.mark.parametrize("method", ["fp8", "blockwise_int8", "compressed-tensors"])
def test_blocks_far_larger_than_the_weight(method: str) -> None:
    """A block of 2^20 rows takes the memory of the rows that there are."""
    weight = codes(9, 4096, method != "blockwise_int8")
    scale, block = torch.rand(1, 512), [1 << 20, 8]
    tensors = {"weight": weight, "weight_scale" if method == "compressed-tensors" else "weight_scale_inv": scale}
    config = {"quant_method": method, "weight_block_size": block}
    if method == "compressed-tensors":
        reader = compressed(strategy="block", block_structure=block)
    else:
        reader = Fp8BlocksReader(config) if method == "fp8" else Int8RowsReader(config)
    with torch.profiler.profile(profile_memory=True) as profile:
        found = reader.read(NAME, 4096, 9, tensors)
    assert max(event.cpu_memory_usage for event in profile.key_averages()) < 1 << 22
    assert torch.equal(dense(found, 4096), weight.double() * scale.double().repeat_interleave(8, 1))


@pytest.mark.parametrize("reader", ["fp8", "int8", "compressed"])
def test_a_bias_that_is_no_number(reader: str) -> None:
    tensors = {"weight": codes(3, 32, reader != "int8"), "weight_scale": torch.rand(3, 1), "bias": torch.zeros(3)}
    tensors["bias"][1] = torch.nan
    made = {
        "fp8": lambda: Fp8BlocksReader({"quant_method": "fp8"}),
        "int8": lambda: Int8RowsReader({"quant_method": "int8"}),
        "compressed": lambda: compressed(strategy="channel", group_size=None),
    }[reader]()
    with pytest.raises(ValueError, match=r"up_proj.bias has NaN or infinite values, 1 of 3"):
        made.read(NAME, 32, 3, tensors)


GROUPS = {"g": {"targets": ["Linear"], "weights": {"strategy": "channel"}}}
PATTERNS = [
    "(a|a)" * 30,
    "(.|.)" * 35 + "X",
    ".?" * 40 + "X",
    ".*" * 12 + "X",
    "((.*)|(.*)){9}",
    "a" * 5000,
    "(\\w|\\w)*X",
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
def test_patterns_that_never_end(pattern: str) -> None:
    began = time.monotonic()
    for read in (
        lambda: GptqReader({"bits": 4, "dynamic": {f"-:{pattern}": {}}}).grouping(NAME),
        lambda: AutoRoundReader({"bits": 4, "extra_config": {f"{pattern}$": {"bits": 8}}}).grouping(NAME),
        lambda: CompressedTensorsReader(
            {"config_groups": GROUPS, "format": "int-quantized", "ignore": [f"re:{pattern}"]}
        ),
    ):
        with pytest.raises(ValueError, match=r"which could take long; valid: up to 4 repetitions"):
            read()
    assert time.monotonic() - began < 5


def test_usual_patterns_are_taken() -> None:
    dynamic = {
        r"-:.*\.18\..*(gate|up)_proj.*": {},
        r"+:model\.layers\.(1[0-9]|2[0-3])\..*": {"bits": 8},
        r".*[*+?{(|]?": {},
    }
    reader = GptqReader({"bits": 4, "dynamic": dynamic})
    assert reader.grouping("model.layers.18.mlp.up_proj") is None
    found = reader.grouping("model.layers.11.mlp.down_proj")
    assert found is not None and found.bits == 8


@pytest.mark.parametrize("method", ["", "gptq", "awq"])
def test_groups_whose_size_cannot_be_told(method: str) -> None:
    """Three groups of 100 inputs may be of 34 to 49: a guess would give wrong weights."""
    weight = random_integers(16, 100, 40, 4)
    tensors = awq_tensors(weight) if method == "awq" else gptq_tensors(weight, 4, g_idx=False)
    if not method:
        words = gptq_tensors(weight, 4)["qweight"].t().contiguous()
        tensors = {"packed_weight": words, "scale": weight.scales, "packed_zp": weight.zeros.int()}
    config: dict[str, object] = {"quant_method": method} if method else {}
    with pytest.raises(
        ValueError, match=r"q.scales? has 3 groups, which do not divide 100 inputs evenly; say group_size"
    ):
        LowPrecisionReader(config).read("q", 100, 16, tensors)
    found = LowPrecisionReader({**config, "group_size": 40}).read("q", 100, 16, tensors)
    assert torch.equal(dense(found, 100), weight.weight)


def test_a_group_size_that_the_scales_contradict() -> None:
    weight = random_integers(16, 64, -1, 4)
    words = gptq_tensors(weight, 4)["qweight"].t().contiguous()
    tensors = {"packed_weight": words, "scale": weight.scales, "packed_zp": weight.zeros.int()}
    with pytest.raises(ValueError, match=r"q.scale has 1 groups; 64 inputs in groups of 32 have 2"):
        LowPrecisionReader({"group_size": 32}).read("q", 64, 16, tensors)
    assert LowPrecisionReader({"group_size": 64}).read("q", 64, 16, tensors).layout.group_size == -1


@pytest.mark.parametrize("suffix", ["weight_zero_point", "pre_quant_scale", "weight_scale_2", "weight_g_idx"])
@pytest.mark.parametrize("reader", [Fp8BlocksReader({"quant_method": "fp8"}), Int8RowsReader({"quant_method": "int8"})])
def test_tensors_that_would_change_the_weight(reader: Fp8BlocksReader | Int8RowsReader, suffix: str) -> None:
    tensors = {"weight": codes(3, 32, isinstance(reader, Fp8BlocksReader)), "weight_scale": torch.rand(3, 1)}
    reader.read(NAME, 32, 3, {**tensors, "input_scale": torch.ones(())})
    with pytest.raises(ValueError, match=rf"up_proj.{suffix} is there: it changes the weight"):
        reader.read(NAME, 32, 3, {**tensors, suffix: torch.ones(3, 1)})
    with pytest.raises(ValueError, match=r"up_proj.weight_scale(_inv)? is there: it changes the weight"):
        reader.read(NAME, 32, 3, {**tensors, "weight_scale_inv": torch.ones(3, 1)})


def test_zeros_of_a_state_dict_that_says_it_has_none() -> None:
    weight = random_integers(16, 64, 32, 4)
    words = gptq_tensors(weight, 4)["qweight"].t().contiguous()
    tensors = {"packed_weight": words, "scale": weight.scales, "packed_zp": weight.zeros.int()}
    assert torch.equal(dense(LowPrecisionReader({"sym": True}).read("q", 64, 16, tensors), 64), weight.weight)
