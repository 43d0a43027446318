"""Work that programs share: parts of a product's inputs and spans of cached tokens, forced where samples are too small, and experts."""

import dataclasses

import pytest
import torch
from comparing import compare_with_double
from covering import covering

from llmrt import ops, xpu
from llmrt.ops import OPERATORS
from llmrt.ops.operator import Sample
from llmrt.xpu.triton import attention, blocks, experts


def few_blocks(sample: Sample) -> bool:
    rows = sample.args[0].shape[:-1].numel()
    return 1 <= rows <= 16 and sample.args[0].shape[-1] > 64


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where the interpreter divides by 0 and rounds NaN
@pytest.mark.parametrize("name", ["quant_linear", "static_linear"])
def test_parts_of_the_inputs_are_summed(name: str, device: str, kernels: xpu.Installed, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(blocks, "parts", lambda *args: asked.append(args) or 3)
    samples = [sample for sample in covering(OPERATORS[name]) if few_blocks(sample)]
    for sample in samples:
        compare_with_double(OPERATORS[name], sample, device)
    assert len(asked) == len(samples) >= 5


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_parts_of_the_inputs_of_experts(device: str, kernels: xpu.Installed, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "parts", lambda *args: 2)
    op = OPERATORS["quant_experts"]
    samples = [s for s in op.sample_inputs(torch.bfloat16) if s.args[0].shape[-1] == 131]
    assert {s.args[1].numel() <= 3 for s in samples} == {True, False}  # alone, and in the order of three experts
    for sample in samples:
        compare_with_double(op, sample, device)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_spans_of_the_cached_tokens_are_merged(device: str, kernels: xpu.Installed, monkeypatch) -> None:
    """64 tokens each: masks, windows and sinks fall into some spans and leave others with nothing to see."""
    merged = []
    monkeypatch.setattr(attention, "MOST_AT_ONCE", 64)
    monkeypatch.setattr(blocks, "spans", lambda programs, tokens: merged.append(tokens) or -(-tokens // 64))
    op = OPERATORS["attention"]
    samples = [s for s in covering(op) if s.args[0].shape[1] in (1, 3) and s.args[3] > 64]
    for sample in samples:
        compare_with_double(op, sample, device)
    assert len(merged) >= 15 and max(merged) > 400


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_entry_of_rows_outside_the_cache_gives_nan_in_any_span(
    device: str, kernels: xpu.Installed, monkeypatch
) -> None:
    monkeypatch.setattr(attention, "MOST_AT_ONCE", 64)
    monkeypatch.setattr(attention, "check_attention", attention.check_attention_sizes)
    monkeypatch.setattr(blocks, "spans", lambda programs, tokens: -(-tokens // 64))
    query, cache = torch.randn(3, 1, 2, 16), torch.randn(2, 2, 150, 16)
    rows = torch.zeros(3, 150, dtype=torch.int32)
    rows[0, 7], rows[1, 149] = 2, -1
    out = ops.attention(*(x.to(device) for x in (query, cache, cache)), 150, 0.25, rows=rows.to(device)).cpu()
    assert out[:2].isnan().all()
    torch.testing.assert_close(out[2:], ops.attention.reference(query[2:], cache, cache, 150, 0.25))


def test_parts_fill_an_idle_device() -> None:
    assert blocks.parts(132, 1, 1 << 20, 4) == 1
    assert [blocks.parts(32, 1, k, 4) for k in (64, 512, 1024, 4096, 14336)] == [1, 1, 2, 8, 16]
    assert [blocks.parts(32, m, 4096, 4) for m in (1, 16, 64, 128, 512)] == [8, 8, 2, 1, 1]
    assert blocks.parts(1, 1, 1 << 20, 8) == blocks.MOST_PARTS
    assert [blocks.spans(8, t) for t in (1, 256, 1024, 1 << 20)] == [1, 1, 4, 64]
    assert blocks.spans(132, 1 << 20) == 1 and blocks.spans(100, 1 << 20) == 5


@pytest.mark.parametrize(("size", "parts", "block"), [(1, 1, 1), (10, 3, 1), (9, 8, 1), (1000, 3, 128), (257, 2, 128)])
def test_shares_hold_everything_once(size: int, parts: int, block: int) -> None:
    count, each = blocks.shared(size, parts, block)
    assert 1 <= count <= parts and each % block == 0
    assert (count - 1) * each < size <= count * each


def test_what_the_host_does_not_read_gives_nan(device: str, kernels: xpu.Installed, monkeypatch) -> None:
    """As on a device: experts and features that do not exist. Three pairs run alone, twelve in the order of three experts."""
    monkeypatch.setattr(experts, "check_values", lambda *args: None)
    for m in (3, 12):
        found = next(s for s in ops.quant_experts.sample_inputs(torch.float32) if s.args[5] is not None)
        x, _, _, *weights = found.args
        count, hidden = weights[0].shape[0], x.shape[1]
        x, scores = torch.randn(m, hidden), torch.rand(m, 1)
        indices = torch.arange(m)[:, None] % count
        expected = ops.quant_experts.reference(x, indices, scores, *weights)
        indices[0], indices[2] = count, -1
        weights[2] = weights[2].clone()
        weights[2][1, 5] = hidden
        moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in (x, indices, scores, *weights)]
        y = ops.quant_experts(*moved).cpu()
        bad = [i for i in range(m) if i in (0, 2) or i % count == 1]
        good = [i for i in range(m) if i not in bad]
        assert y[bad].isnan().all() and (good or m == 3)
        torch.testing.assert_close(y[good], expected[good], atol=1e-4, rtol=1e-4)


def test_rows_have_blocks_of_their_expert_alone(device: str) -> None:
    chosen = experts._choose(torch.tensor([[2, 0], [2, 3], [2, 0]], device=device), 4)
    assert chosen.order is not None and chosen.starts is not None
    assert chosen.order.tolist() == [1, 5, 0, 2, 4, 3] and chosen.starts.tolist() == [0, 2, 2, 5, 6]
    alone = experts._choose(torch.tensor([[2, 0]], device=device), 4)
    assert dataclasses.replace(alone, experts=None) == experts.Chosen(None, 4, 2)
