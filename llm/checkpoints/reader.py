"""What a reader of a foreign quantized checkpoint is: one class per format, chosen by the checkpoint's own configuration.

A reader knows the tensors of ONE linear and nothing of models: names, shapes and dtypes of what the file holds in, a
weight in our terms out. Everything a file says is checked against the linear's sizes before memory is taken: `check` sees
shapes and dtypes only, `read` the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...ops.formats import Layout
from ..linear import Canonical


class Entry(NamedTuple):
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Weight(NamedTuple):
    """The weight [N, K] of one linear.

    Args:
        layout: of the canonical tensors.
        canonical: codes, scales and zeros; see ops/formats.py.
        perm: int32 [K] or None: column k of the canonical weight multiplies input feature perm[k] (act-order sorts columns
            by group).
        bias: [N] or None.
    """

    layout: Layout
    canonical: Canonical
    perm: Tensor | None = None
    bias: Tensor | None = None


class Reader(Protocol):
    """Reads one format. Constructed from the `quantization_config` of a config.json, which it checks (ValueError)."""

    def quantizes(self, name: str, found: Mapping[str, Entry]) -> bool:
        """Return whether the linear `name` is quantized, given its tensors in the file by suffix ("qweight", "scales", ...)."""

    def check(self, name: str, in_features: int, out_features: int, found: Mapping[str, Entry]) -> None:
        """Raise ValueError, naming the tensor, what it is and what it should be, unless `found` is a linear of these sizes."""

    def read(self, name: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> Weight:
        """Return the weight, exactly.

        Raises:
            ValueError: a value is unusable (g_idx out of range, a NaN scale, ...); the message names the tensor.
        """
