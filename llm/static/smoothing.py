"""The arithmetic of SmoothQuant: factors per input channel, the codes' range, and the search for alpha."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...ops.formats import Layout, dequantize
from ...ops.static_linear import quantize_input

#: What `alpha="auto"` tries.
ALPHAS = tuple(i / 20 for i in range(21))
#: Channels with a smaller share of the largest magnitude count as that share: a factor stays finite where a channel is all zeros.
_LEAST_SHARE = 1e-5
_CHUNK = 4096  # outputs whose products are compared at a time


class Range(NamedTuple):
    """Least and largest value of every input channel, float32 [K]."""

    low: Tensor
    high: Tensor

    def with_rows(self, x: Tensor) -> Range:
        """Return the range of rows [M, K] too, M at least 1; NaN stays."""
        low, high = torch.aminmax(x, dim=0)
        return Range(torch.minimum(self.low, low.float()), torch.maximum(self.high, high.float()))


def nothing(in_features: int) -> Range:
    """Return the range of no rows."""
    return Range(torch.full((in_features,), torch.inf), torch.full((in_features,), -torch.inf))


def weight_maxima(weights: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitude of every input channel over weights [N, K], float32 [K]."""
    return torch.stack([torch.stack(torch.aminmax(w, dim=0)).abs().amax(0).float() for w in weights]).amax(0)


def smoothing_factors(seen: Range, weight_max: Tensor, alpha: float) -> Tensor:
    """Return what activations are multiplied by, float32 [K]: wmax^(1 - alpha) / xmax^alpha (Xiao et al. 2022, equation 4, inverted)."""
    maxima = []
    for m in (torch.maximum(seen.low.abs(), seen.high.abs()), weight_max):
        most = float(m.max())
        maxima.append(m.double().clamp(min=most * _LEAST_SHARE) if most > 0 else torch.ones_like(m).double())
    factors = maxima[1] ** (1 - alpha) / maxima[0] ** alpha
    return factors.clamp(1e-8, 1e8).float()


def code_range(seen: Range, factors: Tensor) -> tuple[float, int]:
    """Return scale and zero point of the codes 0 .. 255 that the multiplied activations need; 0 has a code."""
    low = float((seen.low * factors).min().clamp(max=0))
    high = float((seen.high * factors).max().clamp(min=0))
    scale = float(torch.tensor((high - low) / 255 or 1.0, dtype=torch.float32).clamp(1e-30, 1e30))
    return scale, min(255, max(0, round(-low / scale)))


def _chunks(weights: Sequence[Tensor]) -> Iterator[Tensor]:
    for weight in weights:
        for start in range(0, len(weight), _CHUNK):
            yield weight[start : start + _CHUNK].detach().float()


def output_errors(
    rows: Tensor, weights: Sequence[Tensor], seen: Range, layout: Layout, alphas: Sequence[float]
) -> list[float]:
    """Return per alpha the squared error of rows [R, K] @ weight.T in 8 bits, summed over all outputs of the weights [N, K].

    Factors and codes come from the range `seen`; if the rows are not among those seen, what they have beyond it is clamped and
    counts: large alphas give every channel just the range that it was seen with.
    """
    x, weight_max = rows.float(), weight_maxima(weights)
    tried = []
    for alpha in alphas:
        factors = smoothing_factors(seen, weight_max, alpha)
        scale, zero = code_range(seen, factors)
        tried.append((factors, quantize_input(x, factors, scale, zero) * scale))
    errors = [0.0] * len(tried)
    for weight in _chunks(weights):
        exact = x @ weight.T
        for i, (factors, codes) in enumerate(tried):
            parts = ops.quantize_weight(weight / factors, str(layout))
            rounded = dequantize(parts[0], parts[1], None, layout, weight.shape[1])
            errors[i] += float((codes @ rounded.T - exact).square().sum(dtype=torch.float64))
    return errors


def best_alpha(rows: Tensor, weights: Sequence[Tensor], seen: Range, layout: Layout) -> float:
    """Return the one of `ALPHAS` with the least error (see `output_errors`); of equal ones that nearest to 0.5."""
    errors = output_errors(rows, weights, seen, layout, ALPHAS)
    return min(zip(errors, (abs(a - 0.5) for a in ALPHAS), ALPHAS, strict=True))[2]
