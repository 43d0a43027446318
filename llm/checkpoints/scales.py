"""Scales of foreign checkpoints: one for a tensor, a row, a group of a row or a block of rows and columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reader import Entry

#: Tensors that zeros, a smoothing, a second scale or an order of columns add to a weight of scales.
OTHERS = ("weight_zero_point", "qzeros", "weight_scale_2", "pre_quant_scale", "smooth_scale", "g_idx", "weight_g_idx")


class Grid(NamedTuple):
    """How many rows and columns of a weight [N, K] share a scale; -1: all of them. (1, -1) is a scale per row."""

    rows: int
    columns: int

    def counts(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Return the number of scales along N and along K; a last block may be smaller."""
        rows, columns = self.rows, self.columns
        return 1 if rows == -1 else -(-out_features // rows), 1 if columns == -1 else -(-in_features // columns)

    def shapes(self, out_features: int, in_features: int) -> list[tuple[int, ...]]:
        """Return the shapes that a file may give the scales; dimensions of one may be left out."""
        rows, columns = self.counts(out_features, in_features)
        result: list[tuple[int, ...]] = [(rows, columns)]
        if columns == 1:
            result.append((rows,))
        if rows == columns == 1:
            result.append(())
        return result

    def spread(self, scales: Tensor, out_features: int, in_features: int) -> Tensor:
        """Return the scales as a canonical weight has them, [N, G]: those of a block repeated for each of its rows."""
        scales = scales.reshape(self.counts(out_features, in_features))
        if self.rows == -1:
            return scales.expand(out_features, -1).contiguous()
        if self.rows == 1:
            return scales.contiguous()
        return scales.index_select(0, torch.arange(out_features) // self.rows)  # a row count may be far beyond N


def tensor_or_rows(entry: Entry) -> Grid:
    """Return the grid of scales that have no columns: one for the tensor, else one per row."""
    return Grid(-1, -1) if all(size == 1 for size in entry.shape) else Grid(1, -1)
