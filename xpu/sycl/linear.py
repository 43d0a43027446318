"""Quantized linear in SYCL, for few rows: see xpu/sycl/linear.cpp."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ... import ops
from ...ops.formats import Format, Layout
from ...ops.linear import EPILOGUES, GATED
from ..route import route
from .bundle import KINDS, Bundle, launch
from .pointwise import rows_of

#: Sub-groups of a work-group, which share the tiles of a block of outputs, at most.
PARTS = 16
_FLOATS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 4}


def coding(row: Format) -> int:
    """Return what the codes of a format are, as a number of the enumeration in linear.cpp."""
    if row.dtype is not None:
        return _FLOATS[row.dtype]
    return 2 if row.book else (0 if row.bits == 4 else 1)


def rows_at_once(int8: bool) -> int:
    """Return how many rows share a reading of the weight, at most: as many as Arc has registers for (`llmrt xpu table`)."""
    return 8 if int8 else 4


@lru_cache(maxsize=32)
def bundle(row: Format, int8: bool) -> Bundle:
    """Return the bundle for a format, and whether products are of integers: a kernel for one row and one for several."""
    return Bundle(("linear",), (("CODING", coding(row)), ("INT8", int(int8)), ("ROWS", rows_at_once(int8))))


@lru_cache(maxsize=32)
def book(row: Format, compute: str, device: torch.device) -> Tensor | None:
    """Return the values of a look-up as `compute` has them, float32 [16] (for "int8" the integers), or None for other formats."""
    if not row.book:
        return None
    values = row.values(compute)
    return (torch.round(values * row.digits) if compute == "int8" else values).to(device)


@route("sycl", "quant_linear")
def quant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    layout: str,
    out_features: int,
    compute: str = "int8",
    epilogue: str = "none",
) -> Tensor:
    """Run `ops.quant_linear`."""
    out = ops.quant_linear.empty(x, weight, bias, other, layout, out_features, compute, epilogue)
    form = Layout.parse(layout)
    row, sizes = form.format, form.geometry(x.shape[-1])
    int8 = compute == "int8"
    rows, stride = rows_of(x)
    blocks = -(-out_features // 16) if epilogue in GATED else weight.shape[0]
    parts = min(PARTS, sizes.tiles)
    one = len(rows) == 1
    padded_group = sizes.padded_group if sizes.groups > 1 else sizes.group  # of one, padding is past the row's end
    shift = padded_group - sizes.group
    whole_words = x.itemsize == 2 and not (rows.data_ptr() % 4 or stride % 2 or shift % 2)
    launch(
        x.device, bundle(row, int8), "quant_linear_row" if one else "quant_linear_rows",
        (blocks, 1, 1 if one else -(-len(rows) // rows_at_once(int8))), (1, parts, 16),
        rows, weight.contiguous(), None if bias is None else bias.contiguous(), None if other is None else other.contiguous(),
        book(row, compute, x.device), out, len(rows), out_features, x.shape[-1], stride,
        sizes.tiles, sizes.tile_bytes, sizes.group, padded_group, sizes.segment.bit_length() - 1,
        sizes.code_bytes + sizes.scale_bytes, KINDS[form.scale_dtype], KINDS[x.dtype],
        0 if bias is None else KINDS[bias.dtype], form.asymmetric, compute == "bf16" and x.dtype != torch.bfloat16, whole_words,
        EPILOGUES.index(epilogue), 1.0 / row.digits if row.book and int8 else 1.0,
    )  # fmt: skip
    return out
