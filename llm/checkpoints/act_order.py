"""Act-order: columns of a weight that were quantized by importance, so that a table says which group each belongs to."""

from __future__ import annotations

import torch
from torch import Tensor


def read_order(
    name: str, table: Tensor, groups: int, group_size: int, unused: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return what a table of groups asks for: (perm, blocks).

    perm: int32 [K], a `Weight.perm` that sorts the columns by group, None where they are in order. blocks: int64 [G], the group whose
    scales and zeros each run of `group_size` columns uses, None where it is its own (whole groups may have changed places).

    Args:
        name: of the table, for messages.
        table: integers [K], the group of every column.
        groups: G.
        group_size: columns of a group, -1 for all; the last one may have fewer.
        unused: the value all through a table that nobody filled in, None where it must be filled in.

    Raises:
        ValueError: a group does not exist, or groups do not have group_size members (the last may have fewer).
    """
    k = table.shape[0]
    group = k if group_size == -1 else min(group_size, k)
    low, high = int(table.min()), int(table.max())
    if low == high == unused:
        return None, None
    if low < 0 or high >= groups:
        raise ValueError(f"{name} has values {low} .. {high}; valid: 0 .. {groups - 1}, the groups of scales")
    own = torch.arange(k, dtype=table.dtype) // group
    if torch.equal(table, own):
        return None, None
    blocks = table[::group].long()
    if low != high and torch.equal(table, blocks.repeat_interleave(group)[:k].to(table.dtype)):
        return None, blocks
    ordered, perm = torch.sort(table, stable=True)
    if not torch.equal(ordered, own):
        counts = torch.bincount(table.long(), minlength=groups)
        wrong = int((counts != torch.bincount(own.long(), minlength=groups)).nonzero()[0])
        raise ValueError(
            f"{name} gives group {wrong} {int(counts[wrong])} inputs; expected group_size = {group} each, the last group the rest"
        )
    return perm.to(torch.int32), None
