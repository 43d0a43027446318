"""Checkpoints of compressed-tensors (llm-compressor): integers packed or as they are, and floats of 8 bits.

``quant_method: "compressed-tensors"``. A group of the configuration says what its linears ("targets") hold:

- pack-quantized: ``weight_packed`` int32 [N, K * bits / 32], offset binary (code = value + 2^(bits - 1)), fields along K from
  the lowest bits on; ``weight_scale``; ``weight_zero_point`` packed alike along N, int32 [N * bits / 32, G];
  ``weight_shape``; ``weight_g_idx`` [K] after act-order.
- int-quantized, naive-quantized: ``weight`` int8 [N, K], ``weight_scale``, ``weight_zero_point`` int8.
- float-quantized, naive-quantized: ``weight`` float8_e4m3fn [N, K], ``weight_scale``.

value = (code - zero point) * scale. Scales are for a tensor, a row (channel), a group of a row or a block. Quantization of
activations and of the cache is left out: a weight is the same without it, and activations are then more exact.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops.formats import Layout, join_codes
from ..linear import Canonical
from .act_order import read_order
from .entries import SCALES, compile_pattern, entries_of, expect, expect_bias, expect_finite
from .fields import canonical_codes, unpack_fields, words
from .reader import Entry, Weight
from .scales import Grid

QUANT_METHOD = "compressed-tensors"
_READABLE = (
    "pack-quantized (int, 2, 4 or 8 bits), int-quantized and naive-quantized (int, up to 8 bits), float-quantized and "
    "naive-quantized (float, 8 bits), with weight scales per tensor, channel, group or block"
)
#: Values of actorder. With "weight" (or "static") groups are of neighbouring columns.
_ORDERS = (None, False, True, "group", "weight", "dynamic", "static")
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def matches(config: Mapping[str, Any]) -> bool:
    """Return whether a `quantization_config` is of compressed-tensors."""
    return config.get("quant_method") in (QUANT_METHOD, "compressed_tensors")


@dataclass(frozen=True)
class Scheme:
    """What the linears of one group of the configuration hold.

    Args:
        packed: whether codes are fields of int32 words.
        floating: whether they are floats of 8 bits.
        bits: of an integer.
        symmetric: whether the zero point is 0.
        grid: of the scales.
        targets: names, ``re:`` patterns or the class Linear.
        ordered: whether columns were grouped by importance, so that a table must say which group each belongs to.
    """

    packed: bool
    floating: bool
    bits: int
    symmetric: bool
    grid: Grid
    targets: tuple[str, ...]
    ordered: bool = False

    def layout(self, scale_dtype: torch.dtype) -> Layout:
        """Return the layout of the canonical weight."""
        kind = "fp8_e4m3" if self.floating else "int4" if self.packed and self.bits <= 4 else "int8"
        return Layout(kind, not self.symmetric, self.grid.columns, scale_dtype)


class CompressedTensorsReader:
    """Reads linears of compressed-tensors."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Check the configuration.

        Raises:
            ValueError: it has something that cannot be read; the message lists what can.
        """
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise ValueError(
                f"config_groups is {groups!r:.200}; expected a dict of groups, each with targets and weights"
            )
        for key in ("sparsity_config", "transform_config"):
            _refuse_transformed(key, config.get(key))
        self.schemes = [_scheme(str(name), group, config.get("format")) for name, group in groups.items()]
        self.ignore = _names("ignore", config.get("ignore") or [])
        left_out = [
            key for key in ("input_activations", "output_activations") if any(g.get(key) for g in groups.values())
        ]
        left_out += ["kv_cache_scheme"] if config.get("kv_cache_scheme") else []
        if left_out:
            warnings.warn(
                f"{QUANT_METHOD}: {', '.join(left_out)}: not used, only weights are read as quantized", stacklevel=2
            )

    def scheme_of(self, name: str) -> Scheme | None:
        """Return what a linear holds: its name decides, then a pattern, then its class; None where it is not quantized."""
        if "Linear" in self.ignore or any(_matches(name, entry) for entry in self.ignore):
            return None
        ranked: tuple[tuple[Scheme, str], ...] = tuple((s, t) for s in self.schemes for t in s.targets)
        for wanted in (
            lambda t: t == name,
            lambda t: t.startswith("re:") and _matches(name, t),
            lambda t: t == "Linear",
        ):
            for scheme, target in ranked:
                if wanted(target):
                    return scheme
        return None

    def quantizes(self, name: str, found: Mapping[str, Entry]) -> bool:
        """Return whether there are tensors of a quantized linear."""
        weight = found.get("weight")
        plain = weight is None or weight.dtype in SCALES
        return "weight_packed" in found or (weight is not None and ("weight_scale" in found or not plain))

    def check(self, name: str, in_features: int, out_features: int, found: Mapping[str, Entry]) -> None:
        """Check shapes and dtypes; see `Reader`."""
        scheme = self._required_scheme(name)
        n, k = out_features, in_features
        scale = expect(name, "weight_scale", found, scheme.grid.shapes(n, k), SCALES)
        assert scale is not None
        _layout(name, scheme, scale.dtype)
        if scheme.packed:
            expect(name, "weight_packed", found, (n, words(k, scheme.bits)), (torch.int32,))
        else:
            expect(name, "weight", found, (n, k), (torch.float8_e4m3fn if scheme.floating else torch.int8,))
        if not scheme.symmetric or "weight_zero_point" in found:
            packed = scheme.packed and not scheme.symmetric and scheme.grid.rows == 1
            groups = scheme.grid.counts(n, k)[1]
            shapes: Any = [(words(n, scheme.bits), groups)] if packed else scheme.grid.shapes(n, k)
            kinds = (torch.int32,) if packed else (*_INTEGERS, torch.float8_e4m3fn) if scheme.floating else _INTEGERS
            expect(name, "weight_zero_point", found, shapes, kinds)
        expect(name, "weight_shape", found, (2,), (torch.int32, torch.int64), required=False)
        ordered = scheme.ordered and scheme.grid.counts(n, k)[1] > 1
        expect(name, "weight_g_idx", found, (k,), (torch.int32, torch.int64), required=ordered)
        expect_bias(name, found, n)

    def read(self, name: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> Weight:
        """Return the weight; see `Reader`."""
        scheme = self._required_scheme(name)
        self.check(name, in_features, out_features, entries_of(tensors))
        if "weight_shape" in tensors and tensors["weight_shape"].tolist() != [out_features, in_features]:
            shape = tensors["weight_shape"].tolist()
            raise ValueError(f"{name}.weight_shape is {shape}; expected {[out_features, in_features]}, the model's")
        for key in ("weight_scale", "bias"):
            expect_finite(f"{name}.{key}", tensors.get(key))
        scales = scheme.grid.spread(tensors["weight_scale"], out_features, in_features)
        layout = _layout(name, scheme, scales.dtype)
        zeros = _zeros(name, scheme, out_features, in_features, tensors.get("weight_zero_point"))
        perm, blocks = None, None
        if "weight_g_idx" in tensors:  # all -1: written by packages that leave the table unused
            table, groups = tensors["weight_g_idx"], scales.shape[1]
            perm, blocks = read_order(f"{name}.weight_g_idx", table, groups, scheme.grid.columns, -1)
        if blocks is not None:
            scales = scales.index_select(1, blocks)
            zeros = None if zeros is None else zeros.index_select(1, blocks)
        codes = _codes(name, scheme, in_features, tensors, perm)
        return Weight(layout, Canonical(codes, scales, zeros), perm, tensors.get("bias"))

    def _required_scheme(self, name: str) -> Scheme:
        scheme = self.scheme_of(name)
        if scheme is None:
            raise ValueError(f"{name} is quantized in the checkpoint, but no group of config_groups has it as a target")
        return scheme


def _codes(name: str, scheme: Scheme, in_features: int, tensors: Mapping[str, Tensor], perm: Tensor | None) -> Tensor:
    """Return canonical codes, their columns in the order `perm`."""
    if scheme.floating:
        expect_finite(f"{name}.weight", tensors["weight"])
        codes = tensors["weight"].contiguous().view(torch.uint8)
        return codes if perm is None else codes.index_select(1, perm)
    bits = scheme.bits if scheme.packed else 8
    if scheme.packed and perm is None and bits in (4, 8):
        return canonical_codes(tensors["weight_packed"], bits, in_features).contiguous()
    if scheme.packed:
        codes = unpack_fields(tensors["weight_packed"], bits, in_features)
    else:
        codes = tensors["weight"].contiguous().view(torch.uint8) ^ 128
    if scheme.symmetric and bits < 4:
        codes = codes + (8 - (1 << (bits - 1)))  # the zero of 2 bits to that of 4
    if perm is not None:
        codes = codes.index_select(1, perm)
    return join_codes(codes, 4 if bits <= 4 else 8)


def _zeros(name: str, scheme: Scheme, out_features: int, in_features: int, stored: Tensor | None) -> Tensor | None:
    """Return canonical zeros [N, G], None where the scheme is symmetric."""
    if stored is None:
        return None
    if scheme.symmetric:
        if bool(stored.float().any()):
            raise ValueError(f"{name}.weight_zero_point is not 0, but its group of config_groups is symmetric")
        return None
    if scheme.packed and scheme.grid.rows == 1:
        return unpack_fields(stored.t(), scheme.bits, out_features).t().contiguous()
    offset = 1 << (scheme.bits - 1)
    low, high = int(stored.min()), int(stored.max())
    if low < -offset or high >= offset:
        raise ValueError(
            f"{name}.weight_zero_point has the value {low if low < -offset else high}; valid: {-offset} to {offset - 1}"
        )
    zeros = (stored.int() + (offset if scheme.packed else 128)).to(torch.uint8)
    return scheme.grid.spread(zeros, out_features, in_features)


def _layout(name: str, scheme: Scheme, scale_dtype: torch.dtype) -> Layout:
    try:
        return scheme.layout(scale_dtype)
    except RuntimeError as error:
        raise ValueError(f"{name}: {error}") from None


def _scheme(name: str, group: Any, default: Any) -> Scheme:
    """Return the scheme of one entry of config_groups."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ValueError(f"config_groups[{name!r}] is {group!r:.200}; expected a dict with targets and weights")
    form = group.get("format") or default
    bits, kind, symmetric = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("symmetric", True)
    valid = {
        "pack-quantized": kind == "int" and bits in (2, 4, 8),
        "int-quantized": kind == "int" and bits in range(2, 9),
        "float-quantized": kind == "float" and bits == 8,
        "naive-quantized": (kind == "int" and bits in range(2, 9)) or (kind == "float" and bits == 8),
    }
    if not isinstance(form, str) or not valid.get(form, False) or isinstance(bits, bool):
        raise ValueError(
            f"config_groups[{name!r}] has format {form!r}, type {kind!r}, num_bits {bits!r}, which cannot be read; "
            f"readable: {_READABLE}"
        )
    if not isinstance(symmetric, bool) or (kind == "float" and not symmetric):
        raise ValueError(f"config_groups[{name!r}] has symmetric {symmetric!r}; valid: True, and False for integers")
    grid = _grid(name, weights)
    targets = _names(f"config_groups[{name!r}].targets", group.get("targets"))
    order = weights.get("actorder")
    if not any(order is valid or (order == valid and isinstance(order, str)) for valid in _ORDERS):
        raise ValueError(f"config_groups[{name!r}] has actorder {order!r:.100}; valid: {', '.join(map(repr, _ORDERS))}")
    ordered = order in (True, "group", "dynamic")
    return Scheme(form == "pack-quantized", kind == "float", int(bits), symmetric, grid, targets, ordered)


def _grid(name: str, weights: Mapping[str, Any]) -> Grid:
    strategy, size, block = (weights.get(key) for key in ("strategy", "group_size", "block_structure"))
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy in ("tensor", "channel"):
        return Grid(-1 if strategy == "tensor" else 1, -1)
    if strategy == "group" and isinstance(size, int) and _is_size(size):
        return Grid(1, size)
    if strategy == "block" and isinstance(block, list | tuple) and len(block) == 2 and all(map(_is_size, block)):
        return Grid(*block)
    raise ValueError(
        f"config_groups[{name!r}] has strategy {strategy!r}, group_size {size!r}, block_structure {block!r}; valid: tensor, "
        "channel, group with a group_size of 8 or more, block with two sizes of 8 or more"
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 8 <= value <= 1 << 20


def _refuse_transformed(key: str, value: Any) -> None:
    """Raise ValueError if weights are sparse, or were rotated and need their inputs rotated too."""
    if not value:
        return
    form = value.get("format") if isinstance(value, Mapping) else None
    if key == "sparsity_config" and form in (None, "dense") and isinstance(value, Mapping):
        return
    if key == "transform_config" and isinstance(value, Mapping) and not value.get("config_groups"):
        return
    raise ValueError(f"{key} is {value!r:.200}, which cannot be read; readable: {_READABLE}")


def _names(key: str, entries: Any) -> tuple[str, ...]:
    """Return a list of names and patterns; ValueError if it is none, or a pattern is unusable or would take too long."""
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{key} is {entries!r:.200}; expected a list of names and 're:' patterns")
    for entry in entries:
        if entry.startswith("re:"):
            compile_pattern(entry[3:], key)
    return tuple(entries)


def _matches(name: str, entry: str) -> bool:
    return re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name
