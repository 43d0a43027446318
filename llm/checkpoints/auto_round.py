"""AutoRound checkpoints: integer weights in the layout of GPTQ or AWQ, chosen by `packing_format`.

- "auto_round:auto_gptq", "auto_round:gptq" (and none, the default of transformers): GPTQ with zeros stored minus 1.
- "auto_round", "auto_round:gptqmodel": GPTQ with zeros as they are.
- "auto_round:auto_awq", "auto_round:awq": AWQ.

A suffix names the kernel that the writer had in mind ("auto_round:gptq:exllamav2") and means nothing to the layout. `extra_config`
has per layer, by name or regular expression, what differs: bits (16: not quantized), group_size, sym.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .awq import check_awq, read_awq
from .entries import compile_pattern, entries_of, read_names, read_table, read_text
from .gptq import Grouping, check_gptq, read_gptq, read_grouping
from .reader import Entry, Weight

_METHODS = ("auto-round", "auto_round", "autoround", "intel/auto-round")
#: Bits of a layer that stays floating point.
_FLOATING_BITS = (16, 32)
#: Parts of a packing_format that name a kernel, not a layout.
_KERNEL = re.compile(r"ex[a-z]+(v\d)?|marlin|triton(v\d)?|torch")


def matches(config: Mapping[str, Any]) -> bool:
    """Return whether a `quantization_config` is AutoRound's."""
    return config.get("quant_method") in _METHODS


class AutoRoundReader:
    """Reads AutoRound.

    Args:
        config: the `quantization_config`: bits, group_size, sym, packing_format, extra_config, dynamic,
            modules_to_not_convert.

    Raises:
        ValueError: a value is none that can be read (activations in few bits, floating-point codes, rotations).
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Check the configuration."""
        _refuse_others(config)
        self.base = read_grouping(config, Grouping(4, 128))
        self.packing, self.offset = _packing(config)
        extra = read_table(config, "extra_config")
        for part in extra.values():
            _refuse_others(part)
        self.exact = dict(extra)
        self.patterns = [(_pattern(key), part) for key, part in extra.items()]
        for key, part in read_table(config, "dynamic").items():
            excluding = {"bits": 16} if key.startswith("-:") else part
            self.patterns.append((compile_pattern(_without_sign(key), "quantization_config.dynamic"), excluding))
        excluded = read_names(config, "modules_to_not_convert")
        self.patterns += [
            (compile_pattern(text, "quantization_config.modules_to_not_convert"), {"bits": 16}) for text in excluded
        ]
        for _, part in (*self.patterns, (None, {})):
            self._merged(part)

    def _merged(self, part: Mapping[str, Any]) -> Grouping | None:
        if part.get("bits") in _FLOATING_BITS and not isinstance(part.get("bits"), bool):
            return None
        grouping = read_grouping(part, self.base, " (of extra_config)")
        if self.packing == "awq" and grouping.bits != 4:
            raise ValueError(f"quantization_config has {grouping.bits} bits in packing_format AWQ; valid: 4")
        return grouping

    def grouping(self, name: str) -> Grouping | None:
        """Return bits and group size of a linear, None where it is floating point: a name goes before patterns."""
        if name in self.exact:
            return self._merged(self.exact[name])
        for pattern, part in self.patterns:
            if part and pattern.search(name):
                return self._merged(part)
        return self._merged({})

    def quantizes(self, name: str, found: Mapping[str, Entry]) -> bool:
        """Return whether the linear is quantized. What the file holds decides, the configuration where it holds both."""
        return "qweight" in found and not ("weight" in found and self.grouping(name) is None)

    def check(self, name: str, in_features: int, out_features: int, found: Mapping[str, Entry]) -> None:
        """Check shapes and dtypes."""
        grouping = self._quantized(name)
        if self.packing == "awq":
            check_awq(name, in_features, out_features, found, grouping.group_size, not grouping.symmetric)
        else:
            check_gptq(name, in_features, out_features, found, grouping, torch.int32)

    def read(self, name: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> Weight:
        """Return the weight."""
        self.check(name, in_features, out_features, entries_of(tensors))
        grouping = self._quantized(name)
        if self.packing == "awq":
            return read_awq(name, in_features, out_features, tensors, grouping.group_size)
        return read_gptq(name, in_features, out_features, tensors, grouping, self.offset)

    def _quantized(self, name: str) -> Grouping:
        grouping = self.grouping(name)
        if grouping is None:
            raise ValueError(f"{name}.qweight is there although quantization_config.extra_config excludes {name}")
        return grouping


def _packing(config: Mapping[str, Any]) -> tuple[str, int]:
    """Return the layout ("gptq" or "awq") and what is to be added to stored zeros.

    Old writers have no packing_format; their `backend` says the same.
    """
    backend = read_text(config, "backend", "")
    default = backend if backend.startswith("auto_round") else "auto_round:auto_gptq"
    text = read_text(config, "packing_format", default)
    parts = [part for part in text.split(":") if part not in ("auto_round", "auto")]
    layout = parts[0] if parts and not _KERNEL.fullmatch(parts[0]) else ""
    if layout in ("auto_awq", "awq"):
        return "awq", 0
    if layout in ("auto_gptq", "gptq") or text == "auto":
        return "gptq", 1
    if layout in ("", "gptqmodel"):
        return "gptq", 0
    raise ValueError(
        f"quantization_config.packing_format is {text!r}; readable: auto_round, auto_round:auto_gptq, "
        "auto_round:gptqmodel, auto_round:auto_awq"
    )


def _refuse_others(config: Mapping[str, Any]) -> None:
    """Raise ValueError for what integer weights alone do not describe."""
    kind, act_bits = config.get("data_type"), config.get("act_bits")
    if kind is not None and not (isinstance(kind, str) and kind.startswith("int")):
        raise ValueError(f"quantization_config.data_type is {kind!r}; readable: int")
    if act_bits is not None and act_bits not in _FLOATING_BITS:
        raise ValueError(f"quantization_config.act_bits is {act_bits!r}; readable: 16 (weights alone are quantized)")
    for key in ("rotation_config", "super_bits"):
        if config.get(key):
            raise ValueError(f"quantization_config.{key} is {config[key]!r}; readable: none")


def _pattern(key: str) -> re.Pattern[str]:
    """Return the expression of a key of extra_config; a plain name stands for whole parts of names ("gate", not "gate_proj")."""
    text = _without_sign(key)
    plain = re.fullmatch(r"[\w.]+", text)
    return compile_pattern(rf"(^|\.){re.escape(text)}(\.|$)" if plain else text, "quantization_config.extra_config")


def _without_sign(key: str) -> str:
    return key[2:] if key[:2] in ("+:", "-:") else key
