"""Experts over packed weights: both products of every chosen expert in one launch each, whatever was chosen, without waiting for it."""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from ...ops.experts import check_values
from ..route import route
from . import blocks
from .decode import refuses_weight
from .launch import launch, refuses_double
from .products import Chosen, multiply

# mypy: disable-error-code="no-untyped-def"


@triton.jit
def _permute(x, perm, chosen, y, columns, experts, x_row, x_column, perm_row, perm_column, SHARE: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """y [M, K] = x[m // SHARE, perm[chosen[m], k]], NaN where perm leads outside."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + row)
    expert = tl.where((expert < 0) | (expert >= experts), 0, expert)
    source = tl.load(perm + expert * perm_row + k * perm_column, k < columns, other=0)
    there = (source >= 0) & (source < columns)
    v = tl.load(x + row // SHARE * x_row + source * x_column, (k < columns) & there, other=float("nan"))
    tl.store(y + row * columns + k, v, k < columns)


@triton.jit
def _weigh(outputs, chosen, scores, y, columns, experts, s_row, s_column, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """y [M, H] = sum_j scores[m, j] * outputs[m, j], NaN for an expert that does not exist."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in range(CHOSEN):
        expert = tl.load(chosen + row * CHOSEN + j)
        score = tl.load(scores + row * s_row + j * s_column).to(tl.float32)
        score = tl.where((expert < 0) | (expert >= experts), float("nan"), score)
        acc += score * tl.load(outputs + (row * CHOSEN + j) * columns + h, h < columns, other=0.0)
    tl.store(y + row * columns + h, acc.to(y.dtype.element_ty), h < columns)


def _permuted(x: Tensor, perm: Tensor, chosen: Chosen, share: int) -> Tensor:
    """Return x [M / share, K] as rows [M, K] in their experts' order of features."""
    rows, columns = len(chosen.experts), x.shape[1]
    y = x.new_empty((rows, columns))
    launch(
        _permute,
        blocks.columns(columns),
        lambda b: (rows, triton.cdiv(columns, b.sizes["BLOCK"])),
        (),
        *(x, perm, chosen.experts, y, columns, chosen.count, *x.stride(), *perm.stride()),
        SHARE=share,
    )
    return y


def _choose(indices: Tensor, count: int) -> Chosen:
    """Return the experts of all pairs of a token and an expert, in order where experts have several tokens."""
    experts, share = indices.reshape(-1).contiguous(), indices.shape[1]
    if len(experts) <= count:  # hardly any two have the same
        return Chosen(experts, count, share)
    ordered, order = experts.clamp(0, count - 1).sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(count + 1, device=experts.device))
    return Chosen(experts, count, share, order, starts)


def _refuses(
    x: Tensor, indices: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor, *args: Any, **kwargs: Any
) -> str | None:
    reasons = (refuses_weight(weight, name) for weight, name in ((gate_up, "gate_up"), (down, "down")))
    return refuses_double(x, scores) or next(filter(None, reasons), None)


@route("triton", "quant_experts", _refuses)
def quant_experts(
    x: Tensor,
    indices: Tensor,
    scores: Tensor,
    gate_up: Tensor,
    down: Tensor,
    perm: Tensor | None,
    down_perm: Tensor | None,
    layout: str,
    down_layout: str,
    width: int,
    compute: str = "int8",
    down_compute: str = "int8",
    activation: str = "silu",
) -> Tensor:
    """See `llmrt.ops.quant_experts`; on a device an expert that does not exist gives NaN."""
    y = ops.quant_experts.empty(
        *(x, indices, scores, gate_up, down, perm, down_perm, layout, down_layout),
        *(width, compute, down_compute, activation),
    )
    if x.device.type == "cpu":  # a device would have to be waited for
        check_values(indices, perm, down_perm, gate_up.shape[0])
    if not indices.numel() or not y.numel():
        return y.zero_()
    chosen = _choose(indices, gate_up.shape[0])
    share, (rows, columns) = indices.shape[1], (indices.numel(), x.shape[1])
    if perm is not None:
        x, chosen = _permuted(x, perm, chosen, share), replace(chosen, share=1)
    hidden = torch.empty((rows, width), dtype=torch.float32, device=x.device)
    multiply(x, gate_up, None, None, hidden, layout, compute, f"{activation}_mul", chosen)
    chosen = replace(chosen, share=1)
    if down_perm is not None:
        hidden = _permuted(hidden, down_perm, chosen, 1)
    outputs = torch.empty((rows, columns), dtype=torch.float32, device=x.device)
    multiply(hidden, down, None, None, outputs, down_layout, down_compute, "none", chosen)
    launch(
        _weigh,
        blocks.columns(columns),
        lambda b: (len(y), triton.cdiv(columns, b.sizes["BLOCK"])),
        (),
        *(outputs, chosen.experts, scores, y, columns, chosen.count, *scores.stride()),
        CHOSEN=share,
    )
    return y
