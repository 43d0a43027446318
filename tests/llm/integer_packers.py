"""Quantized linears as the formats GPTQ and AWQ store them, packed field by field from the formats' descriptions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmrt.llm.checkpoints.reader import Entry, Weight
from llmrt.ops.formats import check_canonical, dequantize


class Integers(NamedTuple):
    """A weight (codes - zeros) * scales: codes [N, K], zeros and scales [N, G], the group of every input [K]."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor

    @property
    def weight(self) -> Tensor:
        """The float64 weight [N, K]."""
        zeros, scales = self.zeros[:, self.groups].double(), self.scales[:, self.groups].double()
        return (self.codes.double() - zeros) * scales


def random_integers(
    n: int,
    k: int,
    group: int,
    bits: int,
    symmetric: bool = False,
    zero: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Integers:
    """Return a random weight; zero: smallest and largest zero point."""
    size = k if group == -1 else group
    count = -(-k // size)
    low, high = zero or (1, (1 << bits) - 1)
    zeros = torch.full((n, count), 1 << (bits - 1)) if symmetric else torch.randint(low, high + 1, (n, count))
    scales = (torch.rand(n, count) * 0.02 + 0.001).to(dtype)
    return Integers(torch.randint(0, 1 << bits, (n, k)), zeros, scales, torch.arange(k) // size)


def shuffled(weight: Integers) -> Integers:
    """Return the weight with its columns, and their groups, in random order (act-order)."""
    order = torch.randperm(weight.codes.shape[1])
    return weight._replace(codes=weight.codes[:, order], groups=weight.groups[order])


def pack_rows(fields: Tensor, bits: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Return [R, C] fields packed along C through one big Python integer per row, lowest bit first."""
    size, rows = torch.iinfo(dtype).bits, []
    for row in fields.tolist():
        stream = sum(value << (i * bits) for i, value in enumerate(row))
        count = -(-len(row) * bits // size)
        unsigned = [(stream >> (w * size)) & ((1 << size) - 1) for w in range(count)]
        rows.append([u - (1 << size) if dtype.is_signed and u >> (size - 1) else u for u in unsigned])
    return torch.tensor(rows, dtype=dtype)


def gptq_tensors(weight: Integers, bits: int, version: int = 1, g_idx: bool = True) -> dict[str, Tensor]:
    """Return the tensors of a GPTQ linear; version 1 stores zeros minus 1."""
    tensors = {
        "qweight": pack_rows(weight.codes, bits).t().contiguous(),
        "qzeros": pack_rows(weight.zeros.t() - int(version == 1), bits),
        "scales": weight.scales.t().contiguous(),
    }
    if g_idx:
        tensors["g_idx"] = weight.groups.to(torch.int32)
    return tensors


def awq_words(fields: Tensor) -> Tensor:
    """Return [R, N] 4-bit fields in the words of AWQ: nibble i of word j is column 8j + (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    words = torch.zeros(fields.shape[0], fields.shape[1] // 8, dtype=torch.int64)
    for j in range(words.shape[1]):
        for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[:, j] |= fields[:, 8 * j + column] << (4 * i)
    return words.to(torch.int32)


def awq_tensors(weight: Integers) -> dict[str, Tensor]:
    """Return the tensors of an AWQ linear."""
    return {
        "qweight": awq_words(weight.codes.t()),
        "qzeros": awq_words(weight.zeros.t()),
        "scales": weight.scales.t().contiguous(),
    }


def entries(tensors: dict[str, Tensor]) -> dict[str, Entry]:
    """Return what a reader's `check` is given."""
    return {suffix: Entry(tuple(t.shape), t.dtype) for suffix, t in tensors.items()}


def dense(weight: Weight, k: int) -> Tensor:
    """Return the float64 weight [N, K] that a reader's result stands for, columns in the model's order."""
    codes, scales, zeros = weight.canonical
    check_canonical(codes, scales, zeros, weight.layout, k)
    columns = dequantize(codes, scales.double(), zeros, weight.layout, k)
    if weight.perm is None:
        return columns
    assert weight.perm.dtype == torch.int32
    result = torch.empty_like(columns)
    result[:, weight.perm.long()] = columns
    return result
