"""GPTQ checkpoints (AutoGPTQ, GPTQModel; formats "gptq", version 1, and "gptq_v2").

Tensors of a linear [N, K], bits in {2, 3, 4, 8}, all fields dense from the lowest bit (fields.py):

- qweight int32 [ceil(K * bits / 32), N]: fields along K.
- scales floating [G, N].
- qzeros int32 [G, ceil(N * bits / 32)]: fields along N. Version 1 stores the zero minus 1.
- g_idx int32 [K] (optional): the group of every input. Act-order (desc_act) makes it irregular; else it is k // group, or
  all zero where nobody filled it in.
- bias [N] (optional).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .act_order import read_order
from .entries import (
    SCALES,
    compile_pattern,
    entries_of,
    expect,
    expect_bias,
    read_bool,
    read_int,
    read_names,
    read_table,
    read_text,
)
from .fields import unpack_fields, words
from .integers import groups_of, integer_layout, packed_weight
from .reader import Entry, Weight

BITS = (2, 3, 4, 8)
#: Words that GPTQModel's pack_dtype may choose.
_WORDS = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64}


@dataclass(frozen=True)
class Grouping:
    """Bits, group size and scheme of one linear."""

    bits: int
    group_size: int
    symmetric: bool = True
    desc_act: bool = False


def matches(config: Mapping[str, Any]) -> bool:
    """Return whether a `quantization_config` is GPTQ's."""
    return config.get("quant_method") == "gptq"


class GptqReader:
    """Reads GPTQ.

    Args:
        config: the `quantization_config`: bits, group_size, sym, desc_act, checkpoint_format (or format), dynamic,
            modules_in_block_to_quantize, pack_dtype, meta.

    Raises:
        ValueError: a value is none that the format has.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Check the configuration."""
        self.base = read_grouping(config, Grouping(4, 128))
        kind = read_text(config, "checkpoint_format", read_text(config, "format", "gptq"))
        if read_bool(config, "is_marlin_format", False):
            kind = "marlin"
        if kind not in ("gptq", "gptq_v2", "gptq_p"):
            raise ValueError(f"quantization_config.checkpoint_format is {kind!r}; readable: gptq, gptq_v2")
        self.planar, self.offset = kind == "gptq_p", int(kind == "gptq")
        word = read_text(config, "pack_dtype", "int32").removeprefix("torch.")
        if word not in _WORDS:
            raise ValueError(f"quantization_config.pack_dtype is {word!r}; valid: {', '.join(_WORDS)}")
        self.word = _WORDS[word]
        # GPTQModel subtracts 1 from all fields by one subtraction per word, with borrows: it is undone the same way.
        meta = config.get("meta")
        writers = read_names(meta, "quantizer") if isinstance(meta, Mapping) else []
        self.borrows = any(writer.lower().startswith("gptqmodel") for writer in writers)
        self.dynamic = [
            (sign, compile_pattern(text, "quantization_config.dynamic"), part)
            for (sign, text), part in ((_signed(key), part) for key, part in read_table(config, "dynamic").items())
        ]
        for _, pattern, part in self.dynamic:
            self._valid(read_grouping(part, self.base, f" (dynamic {pattern.pattern!r})"))
        self._valid(self.base)

    def _valid(self, grouping: Grouping) -> Grouping:
        if grouping.bits == 3 and (self.planar or self.word is not torch.int32):
            raise ValueError("quantization_config: 3 bits are read from int32 words of checkpoint_format gptq, gptq_v2")
        return grouping

    def grouping(self, name: str) -> Grouping | None:
        """Return bits and group size of a linear, None where `dynamic` excludes it. The first pattern that fits decides."""
        for sign, pattern, part in self.dynamic:
            if pattern.match(name):
                return None if sign == "-:" else read_grouping(part, self.base)
        return self.base

    def quantizes(self, name: str, found: Mapping[str, Entry]) -> bool:
        """Return whether the linear is quantized. What the file holds decides, the configuration where it holds both."""
        return "qweight" in found and not ("weight" in found and self.grouping(name) is None)

    def check(self, name: str, in_features: int, out_features: int, found: Mapping[str, Entry]) -> None:
        """Check shapes and dtypes."""
        grouping = self.grouping(name)
        if grouping is None:
            raise ValueError(f"{name}.qweight is there although quantization_config.dynamic excludes {name}")
        check_gptq(name, in_features, out_features, found, grouping, self.word)

    def read(self, name: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> Weight:
        """Return the weight."""
        self.check(name, in_features, out_features, entries_of(tensors))
        grouping = self.grouping(name)
        assert grouping is not None
        return read_gptq(name, in_features, out_features, tensors, grouping, self.offset, self.borrows)


def read_grouping(config: Mapping[str, Any], default: Grouping, where: str = "") -> Grouping:
    """Return what a configuration says, or the entry of one layer in it."""
    return Grouping(
        read_int(config, "bits", default.bits, BITS, where),
        read_int(config, "group_size", default.group_size, "group", where),
        read_bool(config, "sym", default.symmetric, where),
        read_bool(config, "desc_act", default.desc_act, where),
    )


def _signed(key: str) -> tuple[str, str]:
    match = re.match(r"([+-]:)?", key)
    sign = match[0] if match else ""
    return sign, key[len(sign) :]


def check_gptq(
    name: str,
    in_features: int,
    out_features: int,
    found: Mapping[str, Entry],
    grouping: Grouping,
    word: torch.dtype = torch.int32,
) -> None:
    """Raise ValueError unless `found` is a linear of these sizes in the layout above."""
    size = torch.iinfo(word).bits
    groups = groups_of(in_features, grouping.group_size)
    expect(name, "qweight", found, (words(in_features, grouping.bits, size), out_features), (word,))
    expect(name, "scales", found, (groups, out_features), SCALES)
    zeros = (groups, words(out_features, grouping.bits, size))
    expect(name, "qzeros", found, zeros, (word,), required=not grouping.symmetric)
    ordered = grouping.desc_act and groups > 1
    expect(name, "g_idx", found, (in_features,), (torch.int32, torch.int64), required=ordered)
    expect_bias(name, found, out_features)
    integer_layout(name, grouping.bits, True, grouping.group_size, torch.float16, in_features)


def read_gptq(
    name: str,
    in_features: int,
    out_features: int,
    tensors: Mapping[str, Tensor],
    grouping: Grouping,
    offset: int,
    borrows: bool = False,
) -> Weight:
    """Return the weight of tensors that `check_gptq` has seen.

    Args:
        name: of the linear.
        in_features: K.
        out_features: N.
        tensors: by suffix.
        grouping: bits, group size.
        offset: 1 where zeros are stored minus 1.
        borrows: whether the 1 was subtracted from whole words.
    """
    scales, zeros = tensors["scales"], None
    if "qzeros" in tensors:
        zeros = _zeros(tensors["qzeros"], grouping.bits, out_features, offset, borrows)
    perm, blocks = None, None
    if "g_idx" in tensors:
        unused = None if grouping.desc_act else 0
        perm, blocks = read_order(f"{name}.g_idx", tensors["g_idx"], scales.shape[0], grouping.group_size, unused)
    if blocks is not None:
        scales = scales.index_select(0, blocks)
        zeros = None if zeros is None else zeros.index_select(0, blocks)
    return packed_weight(
        name,
        tensors["qweight"].t(),
        grouping.bits,
        in_features,
        scales.t(),
        None if zeros is None else zeros.t(),
        grouping.group_size,
        perm,
        tensors.get("bias"),
    )


def _zeros(packed: Tensor, bits: int, out_features: int, offset: int, borrows: bool) -> Tensor:
    """Return the zeros, int16 [G, N].

    Field by field 15 + 1 is 16; nothing is carried into a neighbour. Where whole words were subtracted from, the sum of
    words has the borrows undone. (Three-bit fields cross words; GPTQModel wraps each.)
    """
    if offset and borrows:
        if bits == 3:
            return (unpack_fields(packed, bits, out_features) + 1 & 7).to(torch.int16)
        ones = sum(1 << i for i in range(0, torch.iinfo(packed.dtype).bits, bits))
        return unpack_fields(packed + ones, bits, out_features).to(torch.int16)
    return unpack_fields(packed, bits, out_features).to(torch.int16) + offset
