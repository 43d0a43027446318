"""A state dict of quantized linears with a map of its keys: what `optimize(low_precision_checkpoint=...)` takes.

By default a linear [N, K] of 4 bits lies in a state dict as

- packed_weight: words of 32 bits [N, ceil(K/8)], eight fields along K, lowest first.
- scale: floating, [N], [N, 1], [1, N] or [N, G]; a group has K / G inputs.
- packed_zp: integers of scale's shape with one zero each, or eight fields to a word along the last dimension or along N.
- bias [N] (optional).

The configuration may name the keys otherwise (`weight_key`, `scale_key`, `zero_point_key`, `bias_key`), or say `quant_method`
"gptq" or "awq": then the tensors are laid out as of that format, and bits and group size are taken from the shapes where they are not
given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .awq import AwqReader
from .entries import FLOATING, entries_of, expect, read_bool, read_int, read_text
from .fields import WORD_DTYPES, as_bytes, unpack_fields
from .gptq import BITS, GptqReader
from .integers import groups_of, integer_layout, packed_weight
from .reader import Entry, Weight

_KEYS = ("weight_key", "scale_key", "zero_point_key", "bias_key")
_OWN_NAMES = ("packed_weight", "scale", "packed_zp", "bias")
_FOREIGN_NAMES = ("qweight", "scales", "qzeros", "bias")
_WORDS = (torch.int32, torch.uint32, torch.int64)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
_SCALES = (*FLOATING, *_FLOAT8)


class LowPrecisionReader:
    """Reads a state dict of linears.

    Args:
        config: see above; also sym (zeros need not be there: each is 8 then), bits, group_size, desc_act. For a state dict that came
            without a configuration pass {"quant_method": "gptq"}.

    Raises:
        ValueError: a value is none that can be read.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Check the configuration."""
        self.config = dict(config)
        self.method = read_text(config, "quant_method", "")
        if self.method not in ("", "gptq", "awq"):
            raise ValueError(f"quant_method is {self.method!r}; valid: gptq, awq, or none for packed words along K")
        names = _FOREIGN_NAMES if self.method else _OWN_NAMES
        self.keys = tuple(_key(config, key, name) for key, name in zip(_KEYS, names, strict=True))
        if not self.method:
            read_int(config, "bits", 4, (4,))
            read_int(config, "group_size", -1, "group")
            self.symmetric = read_bool(config, "sym", False) or self.keys[2] is None
        elif self.method == "gptq":
            GptqReader(self.config)
        else:
            AwqReader(self.config)

    def quantizes(self, name: str, found: Mapping[str, Entry]) -> bool:
        """Return whether the state dict has anything of a quantized linear `name`; `check` tells whether it has all."""
        return any(key in found for key in self.keys[:3] if key is not None)

    def check(self, name: str, in_features: int, out_features: int, found: Mapping[str, Entry]) -> None:
        """Check keys, shapes and dtypes."""
        for key, part in zip(self.keys[:2], _KEYS[:2], strict=True):
            if key not in found:
                shown = ", ".join(sorted(found)[:8]) or "nothing"
                raise ValueError(f"{name}: the checkpoint has no {name}.{key} ({part} is {key!r}); it has {shown}")
        if self.method:
            renamed = self._renamed(found)
            self._foreign(name, in_features, renamed).check(name, in_features, out_features, renamed)
        else:
            self._check_own(name, in_features, out_features, found)

    def _check_own(self, name: str, in_features: int, out_features: int, found: Mapping[str, Entry]) -> None:
        weight, scale, zero, bias = self.keys
        assert weight is not None and scale is not None
        expect(name, weight, found, (out_features, -(-in_features // 8)), _WORDS)
        expect(name, scale, found, _scale_shape(name, scale, found[scale].shape, out_features), _SCALES)
        groups = _groups(found[scale].shape, out_features)
        self._group_size(name, scale, groups, in_features)
        if self._has_zeros(found):
            assert zero is not None
            if zero not in found:
                raise ValueError(f"{name}: the checkpoint has no {name}.{zero} (zero_point_key is {zero!r})")
            entry = found[zero]
            if entry.dtype not in (*WORD_DTYPES, *FLOATING):
                raise ValueError(f"{name}.{zero} has dtype {str(entry.dtype)[6:]}; expected integers")
            if tuple(entry.shape) not in _zero_shapes(found[scale].shape, out_features, groups):
                raise ValueError(
                    f"{name}.{zero} has shape {list(entry.shape)}; expected {list(found[scale].shape)}, as {scale}, or "
                    "eight zeros to a word"
                )
        if bias is not None:
            expect(name, bias, found, (out_features,), FLOATING, required=False)

    def read(self, name: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> Weight:
        """Return the weight; its bias is None where the checkpoint has none."""
        found = entries_of(tensors)
        self.check(name, in_features, out_features, found)
        if self.method:
            reader = self._foreign(name, in_features, self._renamed(found))
            return reader.read(name, in_features, out_features, self._renamed(tensors))
        weight, scale, zero, bias = self.keys
        assert weight is not None and scale is not None
        groups = _groups(found[scale].shape, out_features)
        scales = tensors[scale].reshape(out_features, groups)
        scales = scales.float() if scales.dtype in (torch.float64, *_FLOAT8) else scales
        zeros = None
        if self._has_zeros(found):
            assert zero is not None
            zeros = _zeros(f"{name}.{zero}", tensors[zero], found[scale].shape, out_features, groups)
        return packed_weight(
            name,
            _low_words(tensors[weight]),
            4,
            in_features,
            scales,
            zeros,
            self._group_size(name, scale, groups, in_features),
            None,
            None if bias is None else tensors.get(bias),
        )

    def _has_zeros(self, found: Mapping[str, Entry]) -> bool:
        """Return whether zeros have to be there, or are although the configuration says sym."""
        return not self.symmetric or self.keys[2] in found

    def _group_size(self, name: str, scale: str, groups: int, in_features: int) -> int:
        """Return the group size that the number of scales means, -1 for one group."""
        size = read_int(self.config, "group_size", -1, "group")
        if size == -1:
            size = even_groups(name, scale, groups, in_features)
        elif groups_of(in_features, size) != groups:
            raise ValueError(
                f"{name}.{scale} has {groups} groups; {in_features} inputs in groups of {size} have {groups_of(in_features, size)}"
            )
        if groups == 1:
            return -1
        integer_layout(name, 4, True, size, torch.float32, in_features)
        return size

    def _foreign(self, name: str, in_features: int, found: Mapping[str, Entry]) -> GptqReader | AwqReader:
        """Return the reader of one linear: bits and group size that nobody gave are those that the shapes have."""
        config = dict(self.config)
        shape, groups = found["qweight"].shape, max(found["scales"].shape[0] if found["scales"].shape else 1, 1)
        if config.get("group_size") is None:
            config["group_size"] = even_groups(name, self.keys[1] or "", groups, in_features)
        if self.method == "awq":
            return AwqReader(config)
        if config.get("bits") is None:
            rows = shape[0] if shape else 0
            config["bits"] = next((bits for bits in BITS if -(-in_features * bits // 32) == rows), 4)
        return GptqReader(config)

    def _renamed(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parts under the names of the format."""
        taken = {key: own for key, own in zip(self.keys, _FOREIGN_NAMES, strict=True) if key is not None}
        return {taken.get(key, key): part for key, part in parts.items() if key in taken or key not in _FOREIGN_NAMES}


def even_groups(name: str, scale: str, groups: int, in_features: int) -> int:
    """Return the group size of groups that are all alike, -1 for one group; ValueError if inputs do not divide so."""
    if in_features % groups:
        raise ValueError(
            f"{name}.{scale} has {groups} groups, which do not divide {in_features} inputs evenly; say group_size in the configuration"
        )
    return -1 if groups == 1 else in_features // groups


def _key(config: Mapping[str, Any], key: str, default: str) -> str | None:
    name = config.get(key, default)
    optional = key in ("zero_point_key", "bias_key")
    if not (isinstance(name, str) and name) and not (name is None and optional):
        raise ValueError(f"{key} is {name!r}; expected the name of a key{', or None' if optional else ''}")
    return name


def _groups(shape: tuple[int, ...], out_features: int) -> int:
    """Return G of a scale's shape that `_scale_shape` has seen."""
    return shape[1] if len(shape) == 2 and shape[0] == out_features else 1


def _scale_shape(name: str, key: str, shape: tuple[int, ...], n: int) -> tuple[int, ...]:
    """Return the shape if a scale may have it."""
    by_group = len(shape) == 2 and shape[0] == n and shape[1] >= 1
    if not (by_group or tuple(shape) in ((n,), (1, n))):
        raise ValueError(f"{name}.{key} has shape {list(shape)}; valid: [{n}], [{n}, 1], [1, {n}], [{n}, groups]")
    return tuple(shape)


def _zero_shapes(scale: tuple[int, ...], n: int, groups: int) -> set[tuple[int, ...]]:
    """Return the shapes that zeros may have beside a scale of this one."""
    eighth = -(-n // 8)
    shapes = {tuple(scale), (n, groups), (n, -(-groups // 8)), (eighth, groups)}
    return shapes | {(n,), (1, n), (eighth,), (1, eighth)} if groups == 1 else shapes


def _zeros(name: str, stored: Tensor, scale: tuple[int, ...], n: int, groups: int) -> Tensor:
    """Return the zeros as int64 [N, G].

    Raises:
        ValueError: a zero is none of 0 .. 15.
    """
    if stored.numel() == n * groups and tuple(stored.shape) in (tuple(scale), (n, groups), (n,), (1, n)):
        plain = stored.double()
        if not bool(((plain >= 0) & (plain <= 15) & (plain == plain.floor())).all()):
            raise ValueError(f"{name} has values {plain.min().item():g} .. {plain.max().item():g}; valid: 0 .. 15")
        return plain.long().reshape(n, groups)
    if stored.dtype not in _WORDS:
        raise ValueError(f"{name} has dtype {str(stored.dtype)[6:]}; eight zeros to a word need int32")
    if tuple(stored.shape) == (n, -(-groups // 8)):
        return unpack_fields(_low_words(stored), 4, groups).long()
    columns = stored.reshape(-1, groups).t()  # packed along N: [G, ceil(N/8)]
    return unpack_fields(_low_words(columns), 4, n).t().long()


def _low_words(packed: Tensor) -> Tensor:
    """Return the low 32 bits of every value as bytes [R, 4 * W]."""
    size = packed.element_size()
    return as_bytes(packed).unflatten(1, (-1, size))[..., :4].flatten(1)
