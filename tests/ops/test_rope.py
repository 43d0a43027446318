"""Rotary embedding: bad arguments are named, never a wild read; the formula of Hugging Face; what must not change."""

from typing import Any

import pytest
import torch

from llmrt import ops

B, S, H, Hk, D, P = 2, 3, 4, 2, 16, 9
Q, K = torch.randn(B, S, H, D), torch.randn(B, S, Hk, D)
COS, SIN = torch.randn(B, S, D), torch.randn(B, S, D)
WEIGHT = torch.randn(D)
TABLE, IDS = torch.randn(P, D), torch.tensor([[0, 1, 8], [3, 4, 5]])
BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "three dimensions": ((Q[0], K, COS, SIN), r"query has shape \[3, 4, 16\]; expected \[any, any, any, any\]"),
    "key of other tokens": ((Q, K[:, :2], COS, SIN), r"key has shape \[2, 2, 2, 16\]; expected \[2, 3, any, 16\]"),
    "key of other width": ((Q, K[..., :8], COS, SIN), r"key has shape \[2, 3, 2, 8\]; expected \[2, 3, any, 16\]"),
    "key of other dtype": ((Q, K.half(), COS, SIN), "key has dtype float16; expected float32"),
    "integer query": ((Q.int(), K.int(), COS, SIN), "query has dtype int32; valid: float32, bfloat16, float16"),
    "integer cos": ((Q, K, COS.long(), SIN.long()), "cos has dtype int64; valid: float32, bfloat16, float16"),
    "two table dtypes": ((Q, K, COS, SIN.bfloat16()), "sin has dtype bfloat16; expected float32"),
    "cos of other tokens": ((Q, K, COS[:, :2], SIN), r"cos has shape \[2, 2, 16\]; expected \[any, 3, any\]"),
    "cos of other batch": (
        (Q[:1].expand(3, -1, -1, -1), K[:1].expand(3, -1, -1, -1), COS, SIN),
        "cos has 2 rows; valid: 1 or 3",
    ),
    "cos of other width": ((Q, K, COS[..., :6], SIN[..., :6]), "cos has 6 columns; valid: 8 or 16"),
    "sin unlike cos": ((Q, K, COS, SIN[..., :8]), r"sin has shape \[2, 3, 8\]; expected \[2, 3, 16\]"),
    "table without ids": ((Q, K, TABLE, TABLE), r"cos has shape \[9, 16\]; expected \[any, 3, any\]"),
    "ids without table": ((Q, K, COS, SIN, IDS), r"cos has shape \[2, 3, 16\]; expected \[any, any\]"),
    "int32 ids": ((Q, K, TABLE, TABLE, IDS.int()), "position_ids has dtype int32; expected int64"),
    "flat ids": ((Q, K, TABLE, TABLE, IDS[0]), r"position_ids has shape \[3\]; expected \[any, 3\]"),
    "ids of other tokens": ((Q, K, TABLE, TABLE, IDS[:, :2]), r"position_ids has shape \[2, 2\]; expected \[any, 3\]"),
    "ids of other batch": ((Q, K, TABLE, TABLE, IDS[[0, 0, 1]]), "position_ids has 3 rows; valid: 1 or 2"),
    "id past the table": ((Q, K, TABLE, TABLE, IDS + 1), "position_ids has value 9; valid: 0 to 8"),
    "negative id": ((Q, K, TABLE, TABLE, IDS - 1), "position_ids has value -1; valid: 0 to 8"),
    "wild id": ((Q, K, TABLE, TABLE, IDS + 2**60), "position_ids has value 11529.*; valid: 0 to 8"),
    "odd rotary_dim": ((Q, K, COS, SIN, None, 7), "rotary_dim is 7; valid: even, 2 to 16"),
    "large rotary_dim": ((Q, K, COS, SIN, None, 18), "rotary_dim is 18; valid: even, 2 to 16"),
    "negative rotary_dim": ((Q, K, COS, SIN, None, -2), "rotary_dim is -2; valid: even, 2 to 16"),
    "query_weight alone": (
        (Q, K, COS, SIN, None, 0, False, WEIGHT),
        "key_weight is missing; valid: query_weight and key_weight, or none",
    ),
    "key_weight alone": ((Q, K, COS, SIN, None, 0, False, None, WEIGHT), "query_weight is missing; valid"),
    "short weight": (
        (Q, K, COS, SIN, None, 0, False, WEIGHT[:8], WEIGHT),
        r"query_weight has shape \[8\]; expected \[16\]",
    ),
    "weight of a row": (
        (Q, K, COS, SIN, None, 0, False, WEIGHT, WEIGHT[None]),
        r"key_weight has shape \[1, 16\]; expected \[16\]",
    ),
    "integer weight": ((Q, K, COS, SIN, None, 0, False, WEIGHT, WEIGHT.int()), "key_weight has dtype int32; valid: fl"),
    "odd head": ((Q[..., :15], K[..., :15], COS[..., :15], SIN[..., :15]), "rotary_dim is 15; valid: even, 2 to 15"),
}


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str, which: str, isa: str) -> None:
    args, message = BAD[case]
    with pytest.raises(RuntimeError, match=message):
        (ops.rope if which == "kernel" else ops.rope.reference)(*args)


def test_equals_the_formula_of_hugging_face(isa: str) -> None:
    angle = torch.randn(B, S, D // 2)
    cos, sin = (torch.cat((t, t), -1) for t in (angle.cos(), angle.sin()))

    def rotate_half(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)

    for x, y in zip((Q, K), ops.rope(Q, K, cos, sin), strict=True):
        torch.testing.assert_close(y, x * cos[:, :, None] + rotate_half(x) * sin[:, :, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_interleaved_is_a_permutation_of_halves(dtype: torch.dtype, interleaved: bool, isa: str) -> None:
    # The pairs' places differ, the arithmetic does not: both styles give the same bits at permuted places.
    half = 40
    query, key = torch.randn(1, 4, 2, 96).to(dtype), torch.randn(1, 4, 1, 96).to(dtype)
    cos, sin = torch.randn(1, 4, half), torch.randn(1, 4, half)
    order = torch.arange(96)
    order[: 2 * half] = torch.arange(2 * half).view(2, half).T.flatten()  # halves -> interleaved
    if not interleaved:
        order = order.argsort()
    for x, y in zip(
        ops.rope(query[..., order].contiguous(), key[..., order].contiguous(), cos, sin, None, 2 * half, interleaved),
        ops.rope(query, key, cos, sin, None, 2 * half, not interleaved),
        strict=True,
    ):
        torch.testing.assert_close(x, y[..., order], rtol={torch.float32: 1e-5}.get(dtype, 2**-7), atol=1e-6)


def test_scores_depend_on_distances_only(isa: str) -> None:
    angle = torch.arange(32)[:, None] / 100.0 ** (torch.arange(8) / 8)
    cos, sin = angle.cos(), angle.sin()
    scores = []
    for shift in (0, 20):
        query, key = ops.rope(Q, K, cos, sin, torch.arange(S)[None] + shift)
        scores.append(torch.einsum("bshd,bthd->bhst", query[:, :, :Hk], key))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rotary_dim", [2, 10, 16, 24])
def test_unrotated_elements_keep_their_bits(rotary_dim: int, isa: str) -> None:
    bits = torch.randint(-(2**15), 2**15, (1, 2, 3, 80), dtype=torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype)
        cos = torch.randn(1, 2, rotary_dim)
        for y in ops.rope(x, x, cos, cos, None, rotary_dim):
            assert torch.equal(y.view(torch.int16)[..., rotary_dim:], bits[..., rotary_dim:])


def test_arguments_stay_and_results_are_new(isa: str) -> None:
    fused = torch.randn(1, 70, 6, 64)  # enough tokens for several threads
    before = fused.clone()
    query, key = ops.rope(fused[:, :, :4], fused[:, :, 4:], *torch.randn(2, 1, 70, 64))
    assert torch.equal(fused, before) and query.is_contiguous() and key.is_contiguous()
    assert query.shape == (1, 70, 4, 64) and key.shape == (1, 70, 2, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rotary_dim", "interleaved"), [(0, False), (0, True), (20, False), (10, True)])
def test_norms_equal_the_two_steps_apart(dtype: torch.dtype, rotary_dim: int, interleaved: bool, isa: str) -> None:
    fused = torch.randn(2, 9, 7, 70).to(dtype)
    query, key = fused[:, :, :4], fused[:, :, 5:]
    query_weight, key_weight = torch.randn(140)[::2], torch.randn(70).to(dtype)
    options = (*torch.randn(2, 1, 9, (rotary_dim or 70) // 2), None, rotary_dim, interleaved)
    for rope, norm in ((ops.rope, ops.rms_norm), (ops.rope.reference, ops.rms_norm.reference)):
        together = rope(query, key, *options, query_weight, key_weight, 1e-5, 0.5)
        apart = rope(norm(query, query_weight, 1e-5, 0.5), norm(key, key_weight, 1e-5, 0.5), *options)
        for x, y in zip(together, apart, strict=True):
            assert torch.equal(x, y) and x.is_contiguous()
