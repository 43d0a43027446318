"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): columns are rounded one after the other, and the weights of the columns still to
come make up for each error as well as the inputs' second moments allow.

With H = X^T X of the inputs and H^-1 = U^T U, U upper triangular, rounding column j makes the error
e_j = (w_j - q_j) / U[j, j], and column k > j changes by -U[j, k] e_j: the paper's algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...ops.formats import join_codes
from ..linear import Canonical, Scheme, quantized
from ..quantization import WeightOnlyQuantConfig

if TYPE_CHECKING:
    from .walk import Group, Layer

#: Columns whose errors are applied to the rest in one product.
BLOCK = 128
#: Damping grows by this factor when the factorization fails, up to the mean diagonal itself.
_MORE_DAMPING = 10.0


class Rounded(NamedTuple):
    """A rounded weight.

    Args:
        canonical: its tensors.
        weight: [N, K], what they stand for, columns in the order of the inputs.
        perm: int32 [K] or None: column k of the canonical weight multiplies input feature perm[k].
        bias: [N] if it changed, else None.
    """

    canonical: Canonical
    weight: Tensor
    perm: Tensor | None = None
    bias: Tensor | None = None


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return U, upper triangular, with U^T U = (H + damping * mean(diag H) * I)^-1, in float64.

    An input that was always zero says nothing of its column: its diagonal becomes the mean, so that nothing is moved to or from it.
    H = R R^T with R upper triangular comes from a Cholesky factorization with rows and columns reversed, and U = R^-1: half the
    work of inverting first. Damping is raised by tens when rounding left H indefinite.

    Args:
        hessian: [K, K], symmetric, positive semidefinite; a multiple of X^T X.
        damping: share of the mean diagonal that is added to the diagonal.

    Raises:
        ValueError: hessian is not finite, or cannot be factored at any damping up to 1.
    """
    matrix = hessian.double()
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("the calibration inputs have NaN or infinite values")
    diagonal = matrix.diagonal()
    alive = diagonal > 0
    mean = float(diagonal[alive].mean()) if bool(alive.any()) else 1.0
    matrix = matrix.clone()
    matrix.diagonal()[~alive] = mean
    while damping <= 1.0:
        damped = matrix.flip(0, 1)
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            unit = torch.eye(len(lower), dtype=lower.dtype)
            return torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True)
        damping = max(damping, 1e-6) * _MORE_DAMPING
    raise ValueError(
        "the second moments of the calibration inputs cannot be factored; use more or other calibration text"
    )


def round_weight(
    weight: Tensor, factor: Tensor, scheme: Scheme, order: Tensor | None = None, static_groups: bool = False
) -> Rounded:
    """Round a weight to a layout's codes.

    Args:
        weight: [N, K] float64 (everything is computed in it) or another floating dtype (float32).
        factor: [K, K] of `inverse_factor`, of the Hessian with rows and columns in `order`.
        scheme: an integer format's layout. Scales and zeros are those of `ops.formats.quantize`; codes are computed with scales as
            stored.
        order: int64 [K], the order in which columns are rounded; None: as they lie.
        static_groups: True: scales are the original weight's, groups are contiguous input features, whatever the order. False: a
            group's scales are computed when its first column's turn comes, from the weights as changed until then; groups follow
            the order, so that the result has a permutation if there is an order.
    """
    layout = scheme.layout
    k = weight.shape[1]
    group = layout.geometry(k).group
    moved = order is not None and not static_groups
    weight = weight if weight.dtype == torch.float64 else weight.float()
    columns = weight.T.contiguous() if order is None else weight.T[order].contiguous()  # [K, N]: a column lies together
    place = torch.arange(k) if order is None or moved else order
    grid = _Grid(scheme, columns, place // group, weight if static_groups else None)
    codes = _round_columns(columns, factor.to(columns.dtype), grid, BLOCK if static_groups else None, group)
    if order is not None and not moved:
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
    canonical = Canonical(join_codes(codes.T.contiguous(), layout.format.bits), *grid.tensors())
    rounded = grid.values(codes, torch.arange(k) // group).T
    if moved:
        assert order is not None
        rounded = torch.empty_like(rounded).index_copy_(1, order, rounded)
    return Rounded(canonical, rounded.contiguous(), order.to(torch.int32) if moved and order is not None else None)


class _Grid:
    """Scales and zeros per group, [G, N], and the rounding with them.

    Args:
        scheme: how they are computed.
        columns: [K, N], the weights as they change.
        groups: int64 [K], the group of each column.
        original: [N, K] to take all groups' scales from at once, or None.
    """

    def __init__(self, scheme: Scheme, columns: Tensor, groups: Tensor, original: Tensor | None) -> None:
        layout, sizes = scheme.layout, scheme.layout.geometry(len(columns))
        self.scheme, self.columns, self.size = scheme, columns, sizes.group
        self.groups: list[int] = groups.tolist()
        self.static = original is not None
        self.levels = layout.format.levels
        shape = (sizes.groups, columns.shape[1])
        self.stored = torch.empty(shape, dtype=layout.scale_dtype)
        self.zeros = torch.full(shape, layout.format.zero, dtype=torch.uint8)
        self.scale, self.inverse, self.zero = (torch.empty(shape, dtype=columns.dtype) for _ in range(3))
        if original is not None:
            self._set(slice(None), quantized(original, scheme))

    def _set(self, where: slice, part: Canonical) -> None:
        self.stored[where] = part.scales.T
        if part.zeros is not None:
            self.zeros[where] = part.zeros.T
        self.scale[where] = part.scales.T.to(self.scale.dtype)
        self.inverse[where] = self.scale[where].reciprocal().nan_to_num_(0.0, 0.0, 0.0)
        self.zero[where] = self.zeros[where].to(self.zero.dtype)

    def round(self, j: int) -> tuple[Tensor, Tensor]:
        """Return codes and values of column j, [N] each; the first column of a group sets the group's scales."""
        g = self.groups[j]
        if not self.static and j % self.size == 0:
            self._set(slice(g, g + 1), quantized(self.columns[j : j + self.size].T, self.scheme))
        codes = (self.columns[j] * self.inverse[g]).round_().add_(self.zero[g]).clamp_(0, self.levels)
        return codes, (codes - self.zero[g]) * self.scale[g]

    def values(self, codes: Tensor, groups: Tensor) -> Tensor:
        """Return what codes [K, N] of columns in these groups stand for."""
        return (codes.to(self.zero.dtype) - self.zero[groups]) * self.scale[groups]

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Return scales and zeros as a checkpoint has them."""
        zeros = self.zeros.T.contiguous() if self.scheme.layout.asymmetric else None
        return self.stored.T.contiguous(), zeros


def _round_columns(columns: Tensor, factor: Tensor, grid: _Grid, block: int | None, group: int) -> Tensor:
    """Round columns [K, N] in turn, changing them; return the codes, uint8 [K, N]."""
    codes = torch.empty(columns.shape, dtype=torch.uint8)
    for start, end in _blocks(len(columns), block, group):
        errors = torch.empty((end - start, columns.shape[1]), dtype=columns.dtype)
        for j in range(start, end):
            codes[j], values = grid.round(j)
            error = torch.sub(columns[j], values, out=errors[j - start]).div_(factor[j, j])
            columns[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return codes


def _blocks(k: int, block: int | None, group: int) -> Iterator[tuple[int, int]]:
    """Yield blocks of columns; block None: none that begins inside a group whose scales it needs, so that those are exact."""
    whole = k if block is not None else max(group, BLOCK // group * group)
    for start in range(0, k, whole):
        for inner in range(start, min(start + whole, k), BLOCK):
            yield inner, min(inner + BLOCK, start + whole, k)


class Gptq:
    """The algorithm over a model's layers: linears with a common input share its second moments and their factorization.

    Args:
        config: its act_order, static_groups and damping.
    """

    def __init__(self, config: WeightOnlyQuantConfig) -> None:
        """Keep the options."""
        self.config = config

    def layer(self, layer: Layer) -> Iterator[tuple[str, Rounded]]:
        """Yield the linears' weights in the order of their calls; each sees the rounded ones before it."""
        for group in layer.groups:
            names = [name for name in group.names if name in layer.schemes]
            if not names:
                continue
            order, factor = self._factor(layer.full(names[0]), _moments(layer, group))
            for name in names:
                linear = layer.linear(name)
                result = round_weight(linear.weight, factor, layer.schemes[name], order, self.config.static_groups)
                linear.weight.data = result.weight
                yield name, result

    def alone(self, name: str, weight: Tensor, scheme: Scheme, moments: Tensor) -> Rounded:
        """Return the rounded weight of a linear outside of the layers."""
        order, factor = self._factor(name, moments)
        return round_weight(weight, factor, scheme, order, self.config.static_groups)

    def folded(self) -> dict[str, Tensor]:
        """Return nothing: only linears change."""
        return {}

    def _factor(self, name: str, moments: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the order of the columns, largest second moment first, and the factor in that order."""
        try:
            if not self.config.act_order:
                return None, inverse_factor(moments, self.config.damping)
            order = moments.diagonal().argsort(descending=True, stable=True)
            return order, inverse_factor(moments[order][:, order], self.config.damping)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _moments(layer: Layer, group: Group) -> Tensor:
    """Return X^T X of a group's inputs over all samples."""
    k = layer.linear(group.names[0]).in_features
    total = torch.zeros((k, k))

    def add(_: Group, x: Tensor) -> None:
        total.addmm_(x.T, x)

    layer.visit_inputs([group], add)
    return total
