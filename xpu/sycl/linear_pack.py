"""Packing weights in SYCL: see xpu/sycl/linear_pack.cpp."""

from __future__ import annotations

from torch import Tensor

from ... import ops
from ...ops.formats import Layout, check_finite
from ..route import route
from .bundle import Bundle, launch

BUNDLE = Bundle(("linear_pack",), ())


@route("sycl", "pack_weight")
def pack_weight(codes: Tensor, scales: Tensor, zeros: Tensor | None, layout: str, in_features: int) -> Tensor:
    """Run `ops.pack_weight`."""
    out = ops.pack_weight.empty(codes, scales, zeros, layout, in_features).zero_()
    form = Layout.parse(layout)
    check_finite(codes, scales, form)
    sizes, (blocks, tiles, tile_bytes) = form.geometry(in_features), out.shape
    launch(
        codes.device, BUNDLE, "pack_weight", (1, blocks, tiles), (1, 1, 256),
        codes.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous(), out,
        codes.shape[0], in_features, codes.shape[1], sizes.groups, sizes.group, sizes.padded_group, sizes.segment,
        form.format.bits, scales.itemsize, tiles, tile_bytes,
    )  # fmt: skip
    return out
