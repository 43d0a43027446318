"""Checkpoints of 8-bit integers with a scale per row: value = integer * scale.

- ``quant_method: "w8a8_int8"`` (SGLang, vLLM forks) and "int8": ``weight`` int8 [N, K], ``weight_scale`` [N, 1] or [N].
- "blockwise_int8": ``weight_scale_inv`` [ceil(N / b0), ceil(K / b1)] with ``weight_block_size: [b0, b1]``.
- "bitsandbytes" with ``load_in_8bit``: ``SCB`` float32 [N], the largest magnitude of a row; scale = SCB / 127. ``weight_format``
  is 0: rows as they are.

Per-row scales of compressed-tensors (llm-compressor's W8A8) are read by compressed_tensors.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...ops.formats import Layout
from ..linear import Canonical
from .entries import SCALES, entries_of, expect, expect_bias, expect_finite, expect_none
from .fp8_blocks import block_size
from .reader import Entry, Weight
from .scales import OTHERS, Grid, tensor_or_rows

_METHODS = ("w8a8_int8", "int8", "blockwise_int8")
_NAMES = ("weight_scale", "weight_scale_inv", "SCB")


def matches(config: Mapping[str, Any]) -> bool:
    """Return whether a `quantization_config` is of 8-bit integers by rows or blocks."""
    method = config.get("quant_method")
    bits8 = bool(config.get("load_in_8bit", config.get("_load_in_8bit")))
    return method in _METHODS or (method == "bitsandbytes" and bits8)


class Int8RowsReader:
    """Reads linears of 8-bit integers."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Check the configuration.

        Raises:
            ValueError: the block size is missing or unusable.
        """
        self.block = block_size(config)
        if config.get("quant_method") == "blockwise_int8" and self.block is None:
            raise ValueError("quant_method is 'blockwise_int8', but there is no weight_block_size, such as [128, 128]")

    def quantizes(self, name: str, found: Mapping[str, Entry]) -> bool:
        """Return whether the weight is of integers, or has a scale."""
        weight = found.get("weight")
        return weight is not None and (weight.dtype == torch.int8 or any(key in found for key in _NAMES))

    def check(self, name: str, in_features: int, out_features: int, found: Mapping[str, Entry]) -> None:
        """Check shapes and dtypes; see `Reader`."""
        expect(name, "weight", found, (out_features, in_features), (torch.int8,))
        suffix = _suffix(found)
        expect_none(name, found, [*OTHERS, *(key for key in _NAMES if key != suffix)])
        grid = self._grid(suffix, found)
        dtypes = (torch.float32,) if suffix == "SCB" else SCALES
        expect(name, suffix, found, grid.shapes(out_features, in_features), dtypes)
        expect(name, "weight_format", found, [(), (1,)], (torch.uint8,), required=False)
        expect_bias(name, found, out_features)

    def read(self, name: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> Weight:
        """Return the weight; see `Reader`."""
        found = entries_of(tensors)
        self.check(name, in_features, out_features, found)
        suffix = _suffix(found)
        form = int(tensors["weight_format"]) if "weight_format" in tensors else 0
        if form != 0:
            raise ValueError(
                f"{name}.weight_format is {form}; valid: 0 (row), save the model with a newer bitsandbytes"
            )
        grid = self._grid(suffix, found)
        for key in (suffix, "bias"):
            expect_finite(f"{name}.{key}", tensors.get(key))
        scales = grid.spread(tensors[suffix], out_features, in_features)
        if suffix == "SCB":
            scales = scales / 127
        layout = Layout("int8", False, grid.columns, scales.dtype)
        codes = tensors["weight"].contiguous().view(torch.uint8) ^ 128  # two's complement to offset binary
        return Weight(layout, Canonical(codes, scales, None), None, tensors.get("bias"))

    def _grid(self, suffix: str, found: Mapping[str, Entry]) -> Grid:
        if suffix == "SCB":
            return Grid(1, -1)
        return self.block or tensor_or_rows(found.get(suffix, Entry((), torch.float32)))


def _suffix(found: Mapping[str, Entry]) -> str:
    return next((key for key in _NAMES if key in found), _NAMES[0])
