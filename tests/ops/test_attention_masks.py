"""Masks of attention that show a part of a buffer: every broadcast, holes, rows that see nothing, junk in what is hidden."""

import math

import pytest
import torch
from torch import Tensor

from llmrt import ops

B, H, HK, D, LENGTH = 4, 4, 2, 16, 700


def shown(kind: str, *shape: int) -> Tensor:
    """Return a random bool mask [.., LENGTH + 5]."""
    first, end = torch.randint(0, LENGTH, (2, *shape, 1)).sort(0).values
    if kind == "same start":
        first = torch.full_like(first, 130)
    if kind == "apart":  # ranges with a gap between those of even and odd rows
        odd = (torch.arange(first.numel()) % 2).view(first.shape)
        first, end = 20 + 400 * odd, 200 + 400 * odd
    if kind == "one":
        end = first + 1
    token = torch.arange(LENGTH + 5)
    mask = (token >= first) & (token < end)
    if kind == "holes":
        mask &= torch.rand(mask.shape) < 0.97
    if kind == "nothing":
        mask &= torch.rand(*shape, 1) < 0.5
    return mask


def visible(mask: Tensor, tokens: int) -> Tensor:
    """Return [B, H, S, LENGTH]."""
    mask = mask[:, None, None] if mask.dim() == 2 else mask
    return mask.expand(B, H, tokens, -1)[..., :LENGTH]


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", ["ranges", "same start", "apart", "one", "holes", "nothing"])
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_equals_reference_whatever_lies_in_hidden_memory(tokens: int, kind: str, beams: int, isa: str) -> None:
    torch.manual_seed(tokens + beams)
    for shape in ((B,), (1, 1, tokens), (B, 1, tokens), (1, H, 1), (B, H, tokens), (B, 1, 1), (1, 1, 1)):
        mask = shown(kind, *shape)
        query = torch.randn(B, tokens, H, D)
        key, value = torch.randn(2, B, HK, LENGTH, D)
        options = {}
        rows = torch.arange(B)[:, None].expand(B, LENGTH)
        if beams > 1:
            first = torch.arange(B) // beams * beams
            rows = first[:, None] + torch.randint(0, beams, (B, LENGTH)) * (torch.arange(LENGTH) > 300)
            options = {"rows": rows.int(), "beams": beams}
        used = torch.zeros(B, LENGTH, dtype=torch.bool)
        for b, seen in enumerate(visible(mask, tokens).flatten(1, 2).any(1)):
            used[rows[b, seen], seen.nonzero().flatten()] = True
        for x in (key, value):
            x[~used[:, None].expand(B, HK, LENGTH)] = math.nan
        for m in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)):
            if m.dim() == 2 and m.dtype != torch.bool:
                continue
            call = (query, key, value, LENGTH, 0.2, False)
            actual = ops.attention(*call, mask=m, **options)
            assert actual.isfinite().all(), (shape, m.dtype)
            torch.testing.assert_close(
                actual,
                ops.attention.reference(*call, mask=m, **options),
                rtol=2e-5,
                atol=2e-5,
                msg=f"{shape} {m.dtype}",
            )


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("filled", [0, 1, 300, 3000])
def test_buffer_of_which_a_part_is_filled(filled: int, tokens: int, threads: int, isa: str) -> None:
    torch.manual_seed(filled + tokens)
    query, key, value = torch.randn(1, tokens, 2, D), *torch.randn(2, 1, 1, 4096, D)
    mask = torch.zeros(1, 1, tokens, 4096, dtype=torch.bool)
    mask[..., :filled] = torch.ones(tokens, filled, dtype=torch.bool).tril(filled - tokens)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        part = ops.attention(query, key, value, 4096, 0.2, False, mask=mask)
    finally:
        torch.set_num_threads(before)
    expected = ops.attention.reference(query, key, value, 4096, 0.2, False, mask=mask)
    torch.testing.assert_close(part, expected, rtol=2e-5, atol=2e-5)
    if filled >= tokens:
        causal = ops.attention(query, key, value, filled, 0.2)
        torch.testing.assert_close(part, causal, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tokens", [1, 40])
def test_bool_masks_may_hold_any_byte(tokens: int, isa: str) -> None:
    query, key, value = torch.randn(1, tokens, 2, D), *torch.randn(2, 1, 1, 300, D)
    mask = torch.rand(1, 1, tokens, 300) < 0.9
    other_true = (mask * torch.tensor([2, 128, 254], dtype=torch.uint8).repeat(100)).view(torch.bool)
    actual = ops.attention(query, key, value, 300, 0.2, False, mask=other_true)
    assert torch.equal(actual, ops.attention(query, key, value, 300, 0.2, False, mask=mask))


def test_mask_shape_is_named(isa: str) -> None:
    query, key, value = torch.randn(1, 3, 2, D), *torch.randn(2, 1, 1, 9, D)
    with pytest.raises(RuntimeError, match=r"mask has shape \[1, 1, 2, 9\] .* \[1 or 1, 2 or 1, 3 or 1, >= 9\]"):
        ops.attention(query, key, value, 9, 0.2, mask=torch.ones(1, 1, 2, 9, dtype=torch.bool))
