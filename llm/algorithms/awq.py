"""AWQ (Lin et al. 2023, arXiv:2306.00978): weights of input channels with large activations are scaled up before rounding, which
makes their errors smaller; the inputs are scaled down by what comes before.

The scale is s = mean|x|^a, normalized, a from a grid by the error of the linears' outputs; then weights are clipped, group by group, if
that makes the outputs better. Scales go into the norm or the linear before where that is exact (llm/algorithms/folding.py); linears
without such a place are only clipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...ops.formats import dequantize
from ..linear import Scheme, quantized
from ..plan import Plan
from .folding import Finder, Target, fold
from .gptq import Rounded
from .walk import Group, Layer

#: Exponents are i / GRID for i = 0 .. GRID - 1.
GRID = 20
#: Clipping keeps 1 - i / GRID of a group's range for i = 0 .. CLIPS - 1.
CLIPS = 10
#: Tokens that errors are measured on, spread evenly over the samples; the mean magnitudes are over all.
ROWS = 2048


class Awq:
    """The algorithm over a model's layers.

    Args:
        plan: says which modules are norms.
        clip: whether weights are clipped.
    """

    def __init__(self, plan: Plan, clip: bool = True) -> None:
        """Start."""
        self.finder, self.clip = Finder(plan), clip
        self._folded: dict[str, Tensor] = {}

    def layer(self, layer: Layer) -> Iterator[tuple[str, Rounded]]:
        """Yield the linears' weights: scales of the whole layer first, while its weights are float, then clipping and rounding."""
        wanted = [group for group in layer.groups if any(name in layer.schemes for name in group.names)]
        seen = _Inputs(layer, wanted)
        biased: set[str] = set()
        for group in wanted:
            target = self.finder.find(layer, group)
            if target is None:
                continue
            scale = self._scale(layer, group, target, seen.rows(group), seen.magnitude(group))
            scale = self._fold(layer, target, scale)
            biased.add(target.name)
            for name in group.names:
                layer.linear(name).weight.data *= scale
            seen.divide(group, scale)
        for group in wanted:
            rows = seen.rows(group)
            for name in group.names:
                if name in layer.schemes:
                    yield name, self._round(layer, name, rows, name in biased)

    def alone(self, name: str, weight: Tensor, scheme: Scheme, moments: Tensor) -> Rounded:
        """Return the rounded weight of a linear outside of the layers: clipped."""
        return _rounded(clipped(weight, scheme, moments) if self.clip else weight, scheme)

    def folded(self) -> dict[str, Tensor]:
        """Return the norms' new parameters."""
        return self._folded

    def _round(self, layer: Layer, name: str, rows: Tensor, biased: bool) -> Rounded:
        linear, scheme = layer.linear(name), layer.schemes[name]
        weight = linear.weight.data
        result = _rounded(clipped(weight, scheme, rows.T @ rows) if self.clip else weight, scheme)
        linear.weight.data = result.weight
        if biased and linear.bias is not None:
            result = result._replace(bias=linear.bias.to(layer.walk.model.get_submodule(layer.full(name)).bias.dtype))
        return result

    @staticmethod
    def _scale(layer: Layer, group: Group, target: Target, rows: Tensor, magnitude: Tensor) -> Tensor:
        """Return the scale [K] with the least error of the group's outputs."""
        best, least = torch.ones_like(magnitude), torch.inf
        for step in range(GRID):
            scale = magnitude.clamp(min=1e-4) ** (step / GRID)
            scale = target.shared(scale / (scale.max() * scale.min()).sqrt())
            error = 0.0
            for name in group.names:
                weight = layer.linear(name).weight
                near = _rounded(weight * scale, layer.schemes[name]).weight / scale
                error += float(((near - weight) @ rows.T).square().sum())
            if error < least:
                best, least = scale, error
        return best

    def _fold(self, layer: Layer, target: Target, scale: Tensor) -> Tensor:
        name = layer.full(target.name)
        original = layer.walk.model.get_submodule(name)

        def stored(part: str, old: Tensor, new: Tensor) -> Tensor:
            kept = new.to(getattr(original, part).dtype)
            self._folded[f"{name}.{part}"] = kept
            return kept.to(old.dtype)

        return fold(layer.module.get_submodule(target.name), target, scale, stored)


class _Inputs:
    """What the groups of a layer are given: mean magnitudes over all tokens and some tokens' values.

    Args:
        layer: run once over all samples.
        groups: which.
    """

    def __init__(self, layer: Layer, groups: list[Group]) -> None:
        total = sum(t.shape[1] for t in layer.walk.tokens)
        self._every = max(1, total // ROWS)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._rows: dict[str, list[Tensor]] = {}
        layer.visit_inputs(groups, self._add)
        for key, total_of in self._sums.items():
            if not bool(torch.isfinite(total_of).all()):
                raise ValueError(f"{layer.full(key)}: the calibration inputs have NaN or infinite values")
        self._kept = {key: torch.cat(parts) for key, parts in self._rows.items()}

    def _add(self, group: Group, x: Tensor) -> None:
        key = group.names[0]
        self._sums[key] = self._sums.get(key, 0) + x.abs().sum(0)
        done = self._counts.get(key, 0)
        self._counts[key] = done + len(x)
        self._rows.setdefault(key, []).append(x[-done % self._every :: self._every].clone())

    def rows(self, group: Group) -> Tensor:
        """Return some inputs [R, K]."""
        return self._kept[group.names[0]]

    def magnitude(self, group: Group) -> Tensor:
        """Return mean |x| [K]."""
        return self._sums[group.names[0]] / self._counts[group.names[0]]

    def divide(self, group: Group, scale: Tensor) -> None:
        """Go on with scaled inputs."""
        self._kept[group.names[0]] /= scale


def _rounded(weight: Tensor, scheme: Scheme) -> Rounded:
    """Round to nearest."""
    part = quantized(weight, scheme)
    return Rounded(part, dequantize(*part, scheme.layout, weight.shape[1]))


def clipped(weight: Tensor, scheme: Scheme, moments: Tensor) -> Tensor:
    """Return the weight with every group's range cut to what gives its part of the outputs the least error.

    Args:
        weight: [N, K] float32.
        scheme: of the rounding.
        moments: [K, K], X^T X of the inputs.
    """
    n, k = weight.shape
    sizes = scheme.layout.geometry(k)
    result = weight.clone()
    for start in range(0, k, sizes.group):
        part, among = (
            weight[:, start : start + sizes.group],
            moments[start : start + sizes.group, start : start + sizes.group],
        )
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        if not scheme.layout.asymmetric:
            high = torch.maximum(high, -low)
            low = -high
        least = torch.full((n, 1), torch.inf)
        for step in range(CLIPS):
            keep = 1 - step / GRID
            cut = part.clamp(low * keep, high * keep)
            off = _rounded(cut, scheme).weight - part
            error = ((off @ among) * off).sum(1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            result[:, start : start + sizes.group] = torch.where(better, cut, result[:, start : start + sizes.group])
    return result
