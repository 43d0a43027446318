"""Rounding a float weight to a quantized one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .check import check, check_floating
from .formats import FORMATS, SCALE_DTYPES, Geometry, Layout, check_fullrange, quantize
from .operator import Sample, operator


def _check(weight: Tensor, layout: str, fullrange: bool) -> Geometry:
    check(weight.dim() == 2, f"weight has {weight.dim()} dimensions; expected [N, K]")
    check_floating(weight, "weight")
    form = Layout.parse(layout)
    check_fullrange(fullrange, form)
    return form.geometry(weight.shape[1])


@operator(exact=True)
def quantize_weight(weight: Tensor, layout: str, fullrange: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize by rounding to nearest: `quantize` of ops/formats.py, which has the formulas, as one pass over the weight.

    Every step is one rounded float32 operation (a quotient, its reciprocal, a product, its rounding to an integer), so all
    implementations give the same bits.

    Args:
        weight: [N, K] float32, bfloat16 or float16, finite.
        layout: text of a `Layout`.
        fullrange: symmetric integers only: scale from the signed value of largest magnitude, so that every code is used.

    Returns:
        (codes uint8 [N, ceil(K * bits / 8)], scales [N, G], zeros uint8 [N, G], or [N, 0] when symmetric).

    Raises:
        RuntimeError: an argument does not fit, or weight has NaN or infinite values.
    """
    _check(weight, layout, fullrange)
    codes, scales, zeros = quantize(weight, Layout.parse(layout), fullrange)
    return codes, scales, weight.new_empty((len(weight), 0), dtype=torch.uint8) if zeros is None else zeros


@quantize_weight.fake
def _(weight: Tensor, layout: str, fullrange: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    form, sizes, n = Layout.parse(layout), _check(weight, layout, fullrange), weight.shape[0]
    return (
        weight.new_empty((n, -(-weight.shape[1] * form.format.bits // 8)), dtype=torch.uint8),
        weight.new_empty((n, sizes.groups), dtype=form.scale_dtype),
        weight.new_empty((n, sizes.groups if form.asymmetric else 0), dtype=torch.uint8),
    )


def _special(n: int, k: int) -> Tensor:
    """Rows of zeros of both signs, of ties between magnitudes, of tiny and of huge values."""
    weight = torch.randn(n, k)
    weight[0] = 0.0
    weight[1 % n] = -0.0
    weight[2 % n, ::3], weight[2 % n, 1::3] = 5.0, -5.0
    weight[3 % n] *= 1e-38
    weight[4 % n] *= 1e37
    weight[5 % n] = weight[5 % n].abs()
    weight[6 % n] = torch.arange(k) % 8 - 3.5  # halves: ties of the rounding
    return weight


@quantize_weight.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    for name, row in FORMATS.items():
        for asymmetric, fullrange in ((False, False), (True, False), (False, True))[: 3 if row.integer else 1]:
            for group, scale, n, k in (
                (32, "bf16", 7, 300),
                (128, "f32", 9, 256),
                (-1, "bf16", 8, 131),
                (100, "f16", 12, 201),
                (9, "f32", 7, 41),
                (32, "e8m0", 11, 75),
            ):
                if scale not in row.scale_names:
                    continue
                layout = Layout(name, asymmetric, group, SCALE_DTYPES[scale])
                weight = _special(n, k).to(dtype).nan_to_num(posinf=3e4, neginf=-3e4)
                yield Sample(f"{layout} {fullrange} {n}x{k}", (weight, str(layout), fullrange))
    wide = torch.randn(4, 3 * 64, dtype=dtype)
    yield Sample("row stride", (wide[:, 64:128], "int4_sym_g32_bf16"))
    yield Sample("column stride", (torch.randn(64, 5, dtype=dtype).T, "int8_asym_channel_f32"))
    yield Sample("no rows", (wide[:0], "int4_asym_g32_bf16"))
