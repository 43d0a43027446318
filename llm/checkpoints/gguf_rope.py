"""Rotations of GGUF files that are stretched for long texts, which transformers' own reading of GGUF leaves out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..families.stretched import STRETCHED_ROPE

#: A tensor [head dim / 2]: what each frequency is divided by.
FACTORS = "rope_freqs.weight"


def rope_scaling(
    values: Mapping[str, Any], architecture: str, factors: Tensor | None, fields: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return what a configuration has as rope_scaling, None for a plain rotation.

    Args:
        values: metadata.
        architecture: prefix of the model's keys in them.
        factors: the tensor `FACTORS`, if the file has it.
        fields: of the configuration; its rope_theta is read.

    Raises:
        ValueError: the scaling is of a kind that is not known.
    """
    prefix = f"{architecture}.rope.scaling."
    kind = values.get(f"{prefix}type", "none")
    if factors is not None:
        return _of_factors(factors.double().flatten(), fields)
    if kind == "none":
        return None
    factor = values.get(f"{prefix}factor")
    if kind not in ("linear", "yarn") or not isinstance(factor, float) or not (math.isfinite(factor) and factor > 0):
        raise ValueError(
            f"{prefix}type is {kind!r:.50} with the factor {factor!r:.50}; valid: linear and yarn, a positive factor"
        )
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    length = values.get(f"{prefix}original_context_length")
    if not isinstance(length, int) or length <= 0:
        raise ValueError(f"{prefix}original_context_length is {length!r:.50}; valid: a positive number")
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}


def _of_factors(factors: Tensor, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scaling that divides frequencies by factors: the formula they come from, else the factors themselves."""
    if not bool((factors > 0).all()):
        raise ValueError(f"{FACTORS} has values that are not positive")
    theta, stretched = float(fields.get("rope_theta", 10000.0)), float(factors.max())
    low, high = STRETCHED_ROPE["low_freq_factor"], STRETCHED_ROPE["high_freq_factor"]
    length = STRETCHED_ROPE["original_max_position_embeddings"]
    waves = 2 * math.pi * theta ** (torch.arange(len(factors), dtype=torch.float64) / len(factors))
    smooth = ((length / waves - low) / (high - low)).clamp(0, 1)
    formula = 1 / ((1 - smooth) / stretched + smooth)
    if torch.allclose(formula, factors, rtol=1e-5):
        return {**STRETCHED_ROPE, "factor": stretched}
    context = int(fields.get("max_position_embeddings", length))
    given = factors.tolist()
    return {
        "rope_type": "longrope",
        "short_factor": given,
        "long_factor": given,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }
