"""AWQ checkpoints (AutoAWQ version "gemm", as vLLM, transformers and GPTQModel write them too), 4 bits.

Tensors of a linear [N, K], N a multiple of 8:

- qweight int32 [K, N/8]: fields along N. Field i, from the lowest bit, of a word is column 8 * word + (0, 2, 4, 6, 1, 3, 5, 7)[i].
- scales floating [G, N].
- qzeros int32 [G, N/8] in the same order, the zeros as they are; may be absent where zero_point is false (the zero is 8).
- bias [N] (optional).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .entries import SCALES, entries_of, expect, expect_bias, read_bool, read_int, read_names, read_text
from .fields import unpack_fields
from .integers import coded_weight, groups_of, integer_layout
from .reader import Entry, Weight

#: The column in a run of eight that each field of a word holds, lowest bits first, and where to find column 0 .. 7.
FIELD_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
_COLUMN_FIELDS = tuple(FIELD_COLUMNS.index(column) for column in range(8))


def matches(config: Mapping[str, Any]) -> bool:
    """Return whether a `quantization_config` is AWQ's."""
    return config.get("quant_method") == "awq"


class AwqReader:
    """Reads AWQ.

    Args:
        config: the `quantization_config`: bits (w_bit), group_size (q_group_size), zero_point, version (format,
            checkpoint_format), modules_to_not_convert.

    Raises:
        ValueError: a value is none that can be read.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Check the configuration."""
        read_int(config, "w_bit" if "w_bit" in config else "bits", 4, (4,))
        key = "q_group_size" if "q_group_size" in config else "group_size"
        self.group_size = read_int(config, key, 128, "group")
        self.zero_point = read_bool(config, "zero_point", True)
        kind = "gemm"
        for key in ("format", "checkpoint_format", "version"):
            kind = read_text(config, key, kind)
        if kind != "gemm":
            raise ValueError(
                f"quantization_config.version is {kind!r}; readable: gemm (the same weights, stored otherwise)"
            )
        self.excluded = read_names(config, "modules_to_not_convert")

    def quantizes(self, name: str, found: Mapping[str, Entry]) -> bool:
        """Return whether the linear is quantized. What the file holds decides, the configuration where it holds both."""
        excluded = any(part in name for part in self.excluded)
        return "qweight" in found and not ("weight" in found and excluded)

    def check(self, name: str, in_features: int, out_features: int, found: Mapping[str, Entry]) -> None:
        """Check shapes and dtypes."""
        check_awq(name, in_features, out_features, found, self.group_size, self.zero_point)

    def read(self, name: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> Weight:
        """Return the weight."""
        self.check(name, in_features, out_features, entries_of(tensors))
        return read_awq(name, in_features, out_features, tensors, self.group_size)


def check_awq(
    name: str, in_features: int, out_features: int, found: Mapping[str, Entry], group_size: int, zero_point: bool
) -> None:
    """Raise ValueError unless `found` is a linear of these sizes in the layout above."""
    if out_features % 8:
        raise ValueError(f"{name} has {out_features} output features; AWQ stores multiples of 8")
    groups = groups_of(in_features, group_size)
    expect(name, "qweight", found, (in_features, out_features // 8), (torch.int32,))
    expect(name, "scales", found, (groups, out_features), SCALES)
    expect(name, "qzeros", found, (groups, out_features // 8), (torch.int32,), required=zero_point)
    expect_bias(name, found, out_features)
    integer_layout(name, 4, True, group_size, torch.float16, in_features)


def read_awq(name: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor], group_size: int) -> Weight:
    """Return the weight of tensors that `check_awq` has seen."""
    columns = _columns(tensors["qweight"], out_features)
    if in_features % 2:
        columns = torch.nn.functional.pad(columns, (0, 0, 0, 1))
    codes = columns[0::2] | (columns[1::2] << 4)  # two rows to a byte before the transpose: half of it to move
    zeros = _columns(tensors["qzeros"], out_features).t() if "qzeros" in tensors else None
    scales, bias = tensors["scales"].t(), tensors.get("bias")
    return coded_weight(name, codes.t().contiguous(), 4, in_features, scales, zeros, group_size, None, bias)


def _columns(packed: Tensor, out_features: int) -> Tensor:
    """Return the fields [R, N] of rows of words, one to a byte, in the order of the columns."""
    fields = unpack_fields(packed, 4, out_features).unflatten(1, (-1, 8))
    return fields[..., list(_COLUMN_FIELDS)].flatten(1)
