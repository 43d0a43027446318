"""Calibration: linears that compute as before and remember what they saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..plan import Plan
from .config import StaticQuantConfig
from .smoothing import Range, nothing


class Observer:
    """Least and largest value of every input channel, and rows of input drawn evenly from all.

    Args:
        in_features: K.
        rows: how many rows to keep.
    """

    def __init__(self, in_features: int, rows: int) -> None:
        """Nothing seen yet."""
        self.all, self.rest = nothing(in_features), nothing(in_features)
        self.rows, self.seen = rows, 0
        self.kept: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """Take note of inputs [..., K]."""
        x = x.detach().reshape(-1, x.shape[-1])
        if not len(x):
            return
        self.all = self.all.with_rows(x)
        if self.rows:
            self._keep(x)
        self.seen += len(x)

    def _keep(self, x: Tensor) -> None:
        """Reservoir sampling (Vitter 1985, algorithm R); the same rows for the same sequence of inputs."""
        kept = x[:0] if self.kept is None else self.kept
        first = min(len(x), self.rows - len(kept))
        if first:
            kept = torch.cat((kept, x[:first]))
        rest = x[first:].clone()
        generator = torch.Generator().manual_seed(self.seen)
        before = self.seen + 1 + torch.arange(first, len(x), dtype=torch.float64)
        slots = (torch.rand(len(rest), dtype=torch.float64, generator=generator) * before).long()
        for i in (slots < self.rows).nonzero().flatten().tolist():  # the row that is let go belongs to the rest
            kept[slots[i]], rest[i] = rest[i].clone(), kept[slots[i]].clone()
        self.kept = kept
        if len(rest):
            self.rest = self.rest.with_rows(rest)

    def held_out(self) -> Range:
        """Return the range of all rows but the kept ones: what was not kept tells a search about inputs yet to come."""
        return self.rest if self.seen >= 2 * self.rows else self.all

    def range(self) -> Range:
        """Return what was seen per channel."""
        return self.all

    def saw_the_same(self, other: Observer) -> bool:
        """Return whether both linears had the same inputs."""
        return self.seen == other.seen and all(map(torch.equal, self.all, other.all))


class ObservedLinear(nn.Linear):
    """torch's linear with an `observer`. A module becomes one by its class: its weight, hooks and names stay."""

    observer: Observer

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N] for x [..., K], as torch's."""
        self.observer.observe(x)
        return functional.linear(x, self.weight, self.bias)


@dataclass
class Calibration:
    """What a model is being calibrated for: its attribute `static_calibration`.

    Args:
        config: of the quantization.
        groups: full names of the linears; those of a group are called with the same input, as far as the model's structure tells.
        head: full name of the output head.
    """

    config: StaticQuantConfig
    groups: list[tuple[str, ...]]
    head: str | None


def observe(model: Any, plan: Plan, config: StaticQuantConfig) -> Any:
    """Give the linears of a plan's static steps observers, in place; return the model."""
    groups = [step.names for step in plan.steps if step.kind == "static"]
    rows = config.calibration_rows if config.alpha == "auto" else 0
    names = {id(module): name for name, module in model.named_modules()}
    for name in (name for group in groups for name in group):
        linear = model.get_submodule(name)
        linear.__class__ = ObservedLinear
        linear.observer = Observer(linear.in_features, rows)
    model.static_calibration = Calibration(config, groups, names.get(id(model.get_output_embeddings())))
    return model


def is_observed(model: Any) -> bool:
    """Return whether a model is prepared for calibration."""
    return isinstance(getattr(model, "static_calibration", None), Calibration)


def without_observers(model: Any) -> Any:
    """Undo `observe`, in place; return the model."""
    for module in model.modules():
        if isinstance(module, ObservedLinear):
            del module.observer
            module.__class__ = nn.Linear  # type: ignore[assignment]
    del model.static_calibration
    return model
