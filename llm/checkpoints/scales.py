"""Scales of foreign checkpoints: one for a tensor, a row, a group of a row or a block of rows and columns; and checks by headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reader import Entry

#: Scale dtypes that a layout can keep as they are.
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        return (
            scales.repeat_interleave(self.rows, 0)[:out_features].contiguous() if self.rows > 1 else scales.contiguous()
        )


def tensor_or_rows(entry: Entry) -> Grid:
    """Return the grid of scales that have no columns: one for the tensor, else one per row."""
    return Grid(-1, -1) if all(size == 1 for size in entry.shape) else Grid(1, -1)


def require(
    name: str, found: Mapping[str, Entry], suffix: str, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]
) -> Entry:
    """Return the entry of ``name.suffix``.

    Raises:
        ValueError: it is missing, or has another shape or dtype; the message says which and what is valid.
    """
    entry = found.get(suffix)
    if entry is None:
        raise ValueError(f"the checkpoint has no {name}.{suffix}; it has {', '.join(sorted(found)) or 'nothing'}")
    if entry.dtype not in dtypes:
        valid = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}.{suffix} has dtype {str(entry.dtype).removeprefix('torch.')}; valid: {valid}")
    if tuple(entry.shape) not in shapes:
        valid = " or ".join(str(list(s)) for s in shapes)
        raise ValueError(
            f"{name}.{suffix} has shape {list(entry.shape)}; expected {valid}, from the model's configuration"
        )
    return entry


def check_bias(name: str, found: Mapping[str, Entry], out_features: int) -> None:
    """Raise ValueError if there is a bias that is not floating [N]."""
    if "bias" in found:
        require(name, found, "bias", [(out_features,)], SCALE_DTYPES)


def finite(name: str, suffix: str, tensor: Tensor) -> Tensor:
    """Return the tensor; ValueError if it has NaN or infinite values."""
    parts = tensor.reshape(-1).split(1 << 22)  # torch looks at 8-bit floats as float32 only
    if not all(bool(torch.isfinite(part.float()).all()) for part in parts):
        raise ValueError(f"{name}.{suffix} has NaN or infinite values; the checkpoint is damaged")
    return tensor
