"""Act-order: columns of a weight that were quantized by importance, so that a table says which group each belongs to."""

from __future__ import annotations

import torch
from torch import Tensor


def columns_by_group(name: str, group_index: Tensor, group: int, groups: int) -> Tensor | None:
    """Return the order of columns in which groups lie together, or None where they do already.

    Args:
        name: of the table, for messages.
        group_index: integers [K], the group of every column.
        group: columns of a group; the last one may have fewer.
        groups: G.

    Returns:
        int32 [K], a `Weight.perm`.

    Raises:
        ValueError: an index is not in 0 .. G - 1, or a group has more or fewer columns than `group`.
    """
    index = group_index.long()
    if bool((index == index[:1]).all()) and int(index[0]) == -1:  # written by packages that leave the table unused
        return None
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= groups:
        raise ValueError(f"{name} has the group {low if low < 0 else high}; valid: 0 to {groups - 1}")
    counts = torch.bincount(index, minlength=groups)
    expected = torch.full_like(counts, group)
    expected[-1] = len(index) - group * (groups - 1)
    if not torch.equal(counts, expected):
        wrong = int((counts != expected).nonzero()[0])
        raise ValueError(f"{name} gives group {wrong} {int(counts[wrong])} columns; expected {int(expected[wrong])}")
    order = index.argsort(stable=True).int()
    return None if bool((index[1:] >= index[:-1]).all()) else order
