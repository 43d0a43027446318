"""What the tests of calibrating methods share: inputs, options and the reference rounding of one column at a time."""

from __future__ import annotations

from typing import Any

import torch
from models import VOCAB
from torch import Tensor

from llmrt import llm
from llmrt.llm.linear import Scheme, quantized

#: Token ids to calibrate a tiny model on.
TOKENS = [torch.randint(3, VOCAB, (24,), generator=torch.Generator().manual_seed(i)) for i in range(6)]


def config(method: str, **options: Any) -> llm.WeightOnlyQuantConfig:
    """Return a configuration for a tiny model."""
    defaults = {"group_size": 16, "calibration": TOKENS, "compute_dtype": "fp32", "scale_dtype": "fp32"}
    return llm.WeightOnlyQuantConfig(method=method, **{**defaults, **options})


def correlated(rows: int, features: int, seed: int = 0) -> Tensor:
    """Return inputs [rows, features] float64 with a few directions and a few features much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features // 3, features, dtype=torch.float64, generator=generator)
    x = torch.randn(rows, features // 3, dtype=torch.float64, generator=generator) @ mix
    x += 0.3 * torch.randn(rows, features, dtype=torch.float64, generator=generator)
    return x * torch.linspace(0.2, 3, features, dtype=torch.float64)


def nearest(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return (scales, zeros) [N] in float64 of rounding a part [N, g] that is one group."""
    scale = quantized(weight, scheme).scales[:, 0].double()
    zeros = quantized(weight, scheme).zeros
    return scale, torch.full_like(scale, scheme.layout.format.zero) if zeros is None else zeros[:, 0].double()


def one_column_at_a_time(weight: Tensor, hessian: Tensor, scheme: Scheme, order: list[int], static: bool) -> Tensor:
    """Return GPTQ's values [N, K] by optimal brain surgery: round a column, update the others, remove it from H^-1.

    Written from the formula of the paper, q -> delta = -(w - q) / [H^-1]_jj * [H^-1]_j,:, with Gaussian elimination in between.
    """
    k = weight.shape[1]
    group = k if scheme.layout.group_size == -1 else scheme.layout.group_size
    current, inverse, values = weight.clone(), torch.linalg.inv(hessian), torch.zeros_like(weight)
    grids: dict[int, tuple[Tensor, Tensor]] = {}
    for turn, j in enumerate(order):
        which = j // group if static else turn // group
        if which not in grids:
            members = (
                range(j // group * group, min((j // group + 1) * group, k)) if static else order[turn : turn + group]
            )
            source = weight if static else current
            grids[which] = nearest(source[:, list(members)], scheme)
        scale, zero = grids[which]
        inverted = torch.where(scale == 0, 0.0, 1 / scale)
        code = ((current[:, j] * inverted).round() + zero).clamp(0, scheme.layout.format.levels)
        values[:, j] = (code - zero) * scale
        step = (current[:, j] - values[:, j]) / inverse[j, j]
        current -= step[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j] / inverse[j, j]
    return values
