"""Checks that readers share: of configuration values, of shapes and dtypes before tensors are read, of values after."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from math import factorial, inf, prod
from typing import Any

import torch
from torch import Tensor

from .reader import Entry

#: Dtypes that the scales of a layout of integers may have.
SCALES = (torch.float32, torch.bfloat16, torch.float16)
FLOATING = (*SCALES, torch.float64)
_PART = 1 << 22  # values looked at together
#: Of a pattern: letters, repetitions, ways to match a name of usual length.
_PATTERN_LETTERS, _PATTERN_REPEATS, _PATTERN_WAYS, _NAME_LETTERS = 1000, 4, 1 << 24, 64


def entries_of(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Return shapes and dtypes of tensors."""
    return {suffix: Entry(tuple(tensor.shape), tensor.dtype) for suffix, tensor in tensors.items()}


def expect(
    name: str,
    suffix: str,
    found: Mapping[str, Entry],
    shapes: tuple[int, ...] | list[tuple[int, ...]],
    dtypes: Collection[torch.dtype],
    required: bool = True,
) -> Entry | None:
    """Return the entry of the tensor `name.suffix`, None where it is absent and not required.

    Raises:
        ValueError: it is missing, or has another shape (than one of `shapes`) or dtype; the message says which and what is valid.
    """
    entry = found.get(suffix)
    if entry is None:
        if required:
            raise ValueError(f"the checkpoint has no {name}.{suffix}; it has {_listed(found)}")
        return None
    valid_shapes = shapes if isinstance(shapes, list) else [shapes]
    if tuple(entry.shape) not in valid_shapes:
        valid = " or ".join(str(list(s)) for s in valid_shapes)
        raise ValueError(f"{name}.{suffix} has shape {list(entry.shape)}; expected {valid}")
    if entry.dtype not in dtypes:
        valid = ", ".join(str(d)[6:] for d in dtypes)
        raise ValueError(f"{name}.{suffix} has dtype {str(entry.dtype)[6:]}; valid: {valid}")
    return entry


def expect_bias(name: str, found: Mapping[str, Entry], out_features: int) -> None:
    """Raise ValueError if there is a bias that is not floating [N]."""
    expect(name, "bias", found, (out_features,), FLOATING, required=False)


def expect_none(name: str, found: Mapping[str, Entry], suffixes: Collection[str]) -> None:
    """Raise ValueError if there is a tensor that changes the weight in a way that is not read."""
    wrong = [suffix for suffix in suffixes if suffix in found]
    if wrong:
        raise ValueError(
            f"{name}.{wrong[0]} is there: it changes the weight, and a format of scales alone does not say how"
        )


def _listed(found: Mapping[str, Entry]) -> str:
    shown = sorted(found)[:8]
    return ", ".join(shown) + (", ..." if len(found) > 8 else "") if shown else "no tensor of this layer"


def expect_finite(name: str, tensor: Tensor | None) -> None:
    """Raise ValueError if a value is NaN or infinite."""
    if tensor is None:
        return
    parts = tensor.reshape(-1).split(_PART)
    if torch.finfo(tensor.dtype).bits == 8:  # torch looks at these as float32 only
        parts = (part.float() for part in parts)
    wrong = sum(int((~torch.isfinite(part)).sum()) for part in parts)
    if wrong:
        raise ValueError(f"{name} has NaN or infinite values, {wrong} of {tensor.numel()}; the checkpoint is damaged")


def read_int(config: Mapping[str, Any], key: str, default: int, valid: Sequence[int] | str, where: str = "") -> int:
    """Return an integer of a configuration, checked.

    Args:
        config: the dict.
        key: in it.
        default: where it is absent or None.
        valid: the values, or "group" for -1 and positive numbers.
        where: said in the error, such as a layer's name.
    """
    value = config.get(key)
    value = default if value is None else value
    good = isinstance(value, int) and not isinstance(value, bool)
    if good and valid == "group":
        good = value == -1 or value >= 1
    elif good:
        good = value in valid
    if not good:
        text = "-1 (one group per row) or a positive number" if valid == "group" else ", ".join(map(str, valid))
        raise ValueError(f"quantization_config.{key}{where} is {value!r}; valid: {text}")
    return int(value)


def read_bool(config: Mapping[str, Any], key: str, default: bool, where: str = "") -> bool:
    """Return a truth value of a configuration, checked."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"quantization_config.{key}{where} is {value!r}; valid: true, false")
    return value


def read_text(config: Mapping[str, Any], key: str, default: str) -> str:
    """Return a text of a configuration in lower case, checked."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise ValueError(f"quantization_config.{key} is {value!r}; expected a text")
    return value.lower()


def read_names(config: Mapping[str, Any], key: str) -> list[str]:
    """Return a list of texts of a configuration (nested lists are joined, a text alone is a list of one), checked."""
    names: list[str] = []
    rest = [config.get(key)]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            names.append(value)
        elif isinstance(value, list | tuple):
            rest.extend(reversed(value))
        elif value is not None:
            raise ValueError(f"quantization_config.{key} has {value!r}; expected names of modules")
    return names


def read_table(config: Mapping[str, Any], key: str) -> dict[str, Mapping[str, Any]]:
    """Return a dict of dicts of a configuration (false or None inside: empty), checked."""
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"quantization_config.{key} is {value!r}; expected an object of patterns")
    table: dict[str, Mapping[str, Any]] = {}
    for pattern, entry in value.items():
        if not isinstance(pattern, str) or not (isinstance(entry, Mapping) or entry is None or entry is False):
            raise ValueError(f"quantization_config.{key} has {pattern!r}: {entry!r}; expected a pattern and an object")
        table[pattern] = entry or {}
    return table


def compile_pattern(text: str, key: str) -> re.Pattern[str]:
    """Return a regular expression of a configuration, which a stranger wrote.

    Raises:
        ValueError: it is none, or could take long to match: Python's matcher tries every way in which repetitions, options and
            choices can share the letters of a name.
    """
    bare = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "x", text) if len(text) <= _PATTERN_LETTERS else text
    repeats, options = len(re.findall(r"[*+{]", bare)), len(re.findall(r"(?<![(*+?}])\?", bare))
    choices = prod(part.count("|") + 1 for part in re.split(r"[()]", bare))
    ways = _NAME_LETTERS**repeats // factorial(repeats) * 2**options * choices if repeats <= _PATTERN_REPEATS else inf
    if len(text) > _PATTERN_LETTERS or ways > _PATTERN_WAYS or re.search(r"\)[*+{]", bare):
        raise ValueError(
            f"{key} has the pattern {text[:80]!r}, which could take long; valid: up to {_PATTERN_REPEATS} repetitions, none of a "
            f"group, few choices, up to {_PATTERN_LETTERS} letters"
        )
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{key} has {text[:80]!r}, no regular expression: {error}") from None
