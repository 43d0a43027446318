"""Checkpoints of 8-bit floats with a scale per block, row or tensor, as DeepSeek's and many others are published.

- ``quant_method: "fp8"``: ``weight`` float8_e4m3fn [N, K] and, with ``weight_block_size: [128, 128]``, ``weight_scale_inv``
  [ceil(N / 128), ceil(K / 128)], which is the scale in spite of its name; without a block size one scale for the tensor.
- "fbgemm_fp8", "w8a8_fp8" and "modelopt" with an FP8 ``quant_algo``: ``weight_scale`` [N, 1], or one for the tensor.

value = float * scale. Activations are not quantized: what these checkpoints say about that is left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...ops.formats import Layout
from ..linear import Canonical
from .entries import SCALES, entries_of, expect, expect_bias, expect_finite, expect_none
from .reader import Entry, Weight
from .scales import OTHERS, Grid, tensor_or_rows

_METHODS = ("fp8", "fbgemm_fp8", "w8a8_fp8")
_FORMATS = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}
_NAMES = ("weight_scale_inv", "weight_scale")
_DTYPES = (*SCALES, torch.float8_e8m0fnu)


def matches(config: Mapping[str, Any]) -> bool:
    """Return whether a `quantization_config` is of 8-bit floats."""
    method = config.get("quant_method")
    return method in _METHODS or (method == "modelopt" and str(config.get("quant_algo")).upper().startswith("FP8"))


def block_size(config: Mapping[str, Any]) -> Grid | None:
    """Return what `weight_block_size` of a configuration says, None where there is none; ValueError if it is unusable."""
    size = config.get("weight_block_size")
    if size is None:
        return None
    usable = isinstance(size, list | tuple) and len(size) == 2
    if not usable or not all(type(s) is int and 0 < s <= 1 << 20 for s in size) or size[1] < 8:
        raise ValueError(
            f"weight_block_size is {size!r:.100}; expected [rows, columns], such as [128, 128], columns at least 8"
        )
    return Grid(*size)


class Fp8BlocksReader:
    """Reads linears of 8-bit floats."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Check the configuration.

        Raises:
            ValueError: the block size is unusable.
        """
        self.block = block_size(config)
        self.bytes_are_exponents = config.get("scale_fmt") == "ue8m0"
        scheme = config.get("activation_scheme")
        if scheme is not None:
            warnings.warn(
                f"activation_scheme {scheme!r:.50} is not used: activations are not rounded to fp8", stacklevel=2
            )

    def quantizes(self, name: str, found: Mapping[str, Entry]) -> bool:
        """Return whether the weight is of 8-bit floats, or has a scale."""
        weight = found.get("weight")
        return weight is not None and (weight.dtype.itemsize == 1 or any(key in found for key in _NAMES))

    def check(self, name: str, in_features: int, out_features: int, found: Mapping[str, Entry]) -> None:
        """Check shapes and dtypes; see `Reader`."""
        expect(name, "weight", found, (out_features, in_features), tuple(_FORMATS))
        suffix = _suffix(found)
        expect_none(name, found, [*OTHERS, *(key for key in _NAMES if key != suffix)])
        grid = self._grid(suffix, found)
        dtypes = (*_DTYPES, torch.uint8) if self.bytes_are_exponents else _DTYPES
        expect(name, suffix, found, grid.shapes(out_features, in_features), dtypes)
        expect_bias(name, found, out_features)

    def read(self, name: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> Weight:
        """Return the weight; see `Reader`."""
        found = entries_of(tensors)
        self.check(name, in_features, out_features, found)
        suffix = _suffix(found)
        scales, weight = tensors[suffix], tensors["weight"]
        if scales.dtype == torch.uint8:
            scales = scales.view(torch.float8_e8m0fnu)
        for key, tensor in (("weight", weight), (suffix, scales), ("bias", tensors.get("bias"))):
            expect_finite(f"{name}.{key}", tensor)
        exponents = scales.dtype == torch.float8_e8m0fnu
        grid = self._grid(suffix, found)
        scales = grid.spread(scales.view(torch.uint8) if exponents else scales, out_features, in_features)
        if exponents:
            scales = scales.view(torch.float8_e8m0fnu)
        layout = Layout(_FORMATS[weight.dtype], False, grid.columns, scales.dtype)
        return Weight(layout, Canonical(weight.contiguous().view(torch.uint8), scales, None), None, tensors.get("bias"))

    def _grid(self, suffix: str, found: Mapping[str, Entry]) -> Grid:
        return self.block or tensor_or_rows(found.get(suffix, Entry((), torch.float32)))


def _suffix(found: Mapping[str, Entry]) -> str:
    return next((key for key in _NAMES if key in found), _NAMES[0])
