"""Finds where a scale of a linear's inputs can be undone exactly: in the norm or the linear that they come from.

Nothing here knows a model. A candidate's output channels are multiplied by random factors while the layer runs in float64, and the
linear's inputs tell which factor each of them got: all tokens the same one, or the way is not linear in that channel and the
candidate is out (a gate's, behind its activation). With the inputs divided by these factors again, the layer's output must be what it
was: otherwise something else reads the candidate's output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..plan import Plan, is_linear
from .walk import Group, Layer

_TOKENS = 24
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Target:
    """Where a group's input scales can be undone.

    Args:
        name: of the norm or linear, in the layer.
        rows: int64 [R]: its output channels that take part.
        channels: int64 [K]: input feature k is proportional to output channel rows[channels[k]].
        offset: of a norm that multiplies by weight + offset; None for a linear or a layer norm.
    """

    name: str
    rows: Tensor
    channels: Tensor
    offset: float | None = None

    def shared(self, scale: Tensor) -> Tensor:
        """Return scales [K] with one value per channel: the geometric mean over the inputs that it feeds."""
        size = len(self.rows)
        total = torch.zeros(size, dtype=scale.dtype).index_add_(0, self.channels, scale.log())
        count = torch.zeros(size, dtype=scale.dtype).index_add_(0, self.channels, torch.ones_like(scale))
        return (total / count.clamp(min=1)).exp()[self.channels]

    def per_channel(self, scale: Tensor) -> Tensor:
        """Return the factors of the channels [R]; 1 for one that feeds no input."""
        return torch.ones(len(self.rows), dtype=scale.dtype).index_copy_(0, self.channels, scale)


class Finder:
    """Finds targets, once per class of layer.

    Args:
        plan: says which modules are norms, confirmed by probes of their own.
    """

    def __init__(self, plan: Plan) -> None:
        """Note the norms."""
        self.norms = {step.names[0]: step.offset for step in plan.steps if step.kind == "norm"}
        self._known: dict[Any, Target | None] = {}

    def find(self, layer: Layer, group: Group) -> Target | None:
        """Return the target of a group's inputs, or None. All its linears, and a target that is one, are to be quantized."""
        key = (type(self._original(layer)), tuple(layer.schemes), tuple(group.names))
        if key not in self._known:
            self._known[key] = self._search(layer, group) if set(group.names) <= set(layer.schemes) else None
        target = self._known[key]
        return target if target is not None and self.applies(target, layer.full(""), layer.schemes) else None

    def applies(self, target: Target, prefix: str, linears: Container[str]) -> bool:
        """Return whether a target of one layer may be one in another of its class.

        Args:
            target: of a layer with the same linears to be quantized.
            prefix: of the names in the other layer.
            linears: of the layer that are to be quantized.
        """
        if target.offset is None and target.name in linears:
            return True
        return prefix + target.name in self.norms and self.norms[prefix + target.name] == target.offset

    @staticmethod
    def _original(layer: Layer) -> nn.Module:
        return layer.walk.model.get_submodule(layer.name)

    def _search(self, layer: Layer, group: Group) -> Target | None:
        probe = _Probe(layer, group, self.norms)
        features = layer.linear(group.names[0]).in_features
        for name in reversed(probe.before):
            module: Any = layer.module.get_submodule(name)
            norm = layer.full(name) in self.norms
            for rows in [torch.arange(features)] if norm else _row_sets(module.out_features, features):
                channels = probe.channels(name, rows)
                if channels is not None:
                    return Target(name, rows, channels, self.norms.get(layer.full(name)))
        return None


def _row_sets(rows: int, features: int) -> Iterator[Tensor]:
    """Yield which outputs of a linear may be what `features` inputs are proportional to.

    All of them; a half of a fused gate and up; the values of fused queries, keys and values: as many rows as the keys, behind
    them, of all heads or of one head after the other.
    """
    every = torch.arange(rows)
    yield every
    if rows == 2 * features:
        yield every[features:]
        yield every[:features]
    values = (rows - features) // 2  # of features queries, as many keys and values
    if values > 0 and rows == features + 2 * values and features % values == 0:
        for heads in (n for n in range(1, values + 1) if values % n == 0):
            yield every.view(heads, -1, values // heads)[:, -1].flatten()


class _Probe:
    """Runs a float64 copy of a layer on a few tokens with one module's output scaled.

    Attributes:
        before: norms and quantized linears that run before the group, in the order of their calls.
    """

    def __init__(self, layer: Layer, group: Group, norms: Container[str]) -> None:
        self.layer, self.group, self.norms = layer, group, norms
        original, layer.module = layer.module, copy.deepcopy(layer.module).double()
        self.module, layer.module = layer.module, original
        self.before: list[str] = []
        self.input = torch.empty(0)
        with ExitStack() as stack:
            for name, module in self.module.named_modules():
                if name in layer.schemes or layer.full(name) in norms:
                    note = lambda m, args, name=name: self.before.append(name)  # noqa: E731
                    stack.callback(module.register_forward_pre_hook(note).remove)
            self.output = self._run()
        self.expected = self.input
        first = self.before.index(group.names[0])
        self.before = [n for n in dict.fromkeys(self.before[:first]) if self._may_be(n)]
        entering = layer.walk.hidden[0][:, :_TOKENS].double()
        self.size = (self.output - entering).square().mean().sqrt()

    def _may_be(self, name: str) -> bool:
        if name in self.layer.schemes:
            return name not in self.group.names
        weight = getattr(self.module.get_submodule(name), "weight", None)
        return isinstance(weight, Tensor) and weight.shape == self.expected.shape[-1:]

    def _run(self, divide: Tensor | None = None) -> Tensor:
        """Return the output; keeps the group's input, which is divided by factors [K] if given."""

        def see(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            self.input = args[0]
            return args if divide is None else (args[0] / divide, *args[1:])

        original, self.layer.module = self.layer.module, self.module
        try:
            with ExitStack() as stack:
                for name in self.group.names:
                    stack.callback(self.module.get_submodule(name).register_forward_pre_hook(see).remove)
                return self.layer.run(0, _TOKENS, torch.float64)
        finally:
            self.layer.module = original

    def channels(self, name: str, rows: Tensor) -> Tensor | None:
        """Return which of some output channels [R] of a module each input of the group is proportional to, or None."""
        generator = torch.Generator().manual_seed(0)
        factors = 0.5 + 1.5 * torch.rand(len(rows), dtype=torch.float64, generator=generator)

        def scale(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[..., rows] *= factors
            return out

        handle = self.module.get_submodule(name).register_forward_hook(scale)
        try:
            self._run()
            found = _proportions(self.expected.flatten(0, -2), self.input.flatten(0, -2), factors)
            if found is None:
                return None
            same = self._run(factors[found])
        finally:
            handle.remove()
        close = (same - self.output).abs().max() <= _TOLERANCE * self.size
        return found if bool(close) else None


def _proportions(before: Tensor, after: Tensor, factors: Tensor) -> Tensor | None:
    """Return per column of [T, K] the index of the factor between before and after, or None unless every column has one."""
    token = before.abs().argmax(0, keepdim=True)
    ratio = (after.gather(0, token) / before.gather(0, token))[0].nan_to_num(0.0)
    if len(factors) == len(ratio):
        found = torch.arange(len(ratio))
    else:
        ordered, order = factors.sort()
        right = torch.searchsorted(ordered, ratio).clamp(1, len(factors) - 1)
        nearer = torch.where(ratio - ordered[right - 1] < ordered[right] - ratio, right - 1, right)
        found = order[nearer]
    exact = before * factors[found]
    close = (after - exact).abs() <= _TOLERANCE * before.abs().amax(0)
    return found if bool(close.all()) else None


def fold(module: Any, target: Target, scale: Tensor, parameters: Callable[[str, Tensor, Tensor], Tensor]) -> Tensor:
    """Divide a target's channels by input scales and return the scales [K] that were folded.

    Args:
        module: the norm or linear, in float32.
        target: see `Target`.
        scale: [K] that are one per channel.
        parameters: called with (name, old, new) for every parameter of a norm; returns the new one as it can be stored.
    """
    factors = target.per_channel(scale)
    if is_linear(module):
        for part in (module.weight, module.bias):
            if part is not None:
                part.data[target.rows] /= factors if part.dim() == 1 else factors[:, None]
        return scale
    offset = target.offset or 0.0
    old: Any = module.weight
    new = parameters("weight", old, (old + offset) / factors - offset)
    lost = (new + offset == 0) & (old + offset != 0)
    if bool(lost.any()):  # a channel that rounding would switch off stays as it is
        new = parameters("weight", old, torch.where(lost, old, new))
    exact = torch.where(new + offset == 0, factors, (old + offset) / (new + offset))
    old.data = new
    if getattr(module, "bias", None) is not None:
        bias: Any = module.bias
        bias.data = parameters("bias", bias, bias / exact)
    return exact[target.channels]
