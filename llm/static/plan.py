"""Decides which linears become static INT8, and makes them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...ops.formats import Layout
from ...ops.static_linear import MOST_INPUTS
from ..algorithms import Calibrated
from ..convert import Converter
from ..linear import CanonicalLinear, Scheme
from ..plan import Planner, Step, is_linear
from .config import SCALES, StaticQuantConfig, weight_layout
from .folding import Folds, find_folds
from .linear import (
    COMPUTE,
    InputCodes,
    StaticGatedMLP,
    StaticGroup,
    StaticLinear,
    StaticSibling,
    StoredStaticLinear,
    rounded,
)
from .summary import read_qconf_summary


class StaticPlanner(Planner):
    """As for floating point, but linears get steps of the kind "static", those of feed-forward modules are joined with activations.

    Args:
        model: floating point, or as an llmrt-static checkpoint was loaded.
        config: of the quantization.
        summary: of the calibration; None for a model that is to be calibrated, or was loaded.
        dtype: that norms will have; None: as they are.

    Attributes:
        inputs: how linears round their input, by name; empty for a model that is to be calibrated.
        folds: where factors of `inputs` went instead.
    """

    operator = "static_linear"

    def __init__(
        self,
        model: Any,
        config: StaticQuantConfig,
        summary: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Remember what is asked for."""
        super().__init__(model, None)
        self.plan_.quantization = config
        self.static = config
        self.summary_file, self.dtype = summary, dtype
        self.inputs: dict[str, InputCodes] = {}
        self.layouts: dict[str, Layout] = {}
        self.kept: dict[str, str | None] = {}
        self.folds = Folds()

    def _mlps(self) -> None:
        """Look at the linears before anything joins them."""
        self._unmatched()
        head = self.model.get_output_embeddings()
        wanted = {n: m for n, m in self.modules.items() if isinstance(m, nn.Linear | CanonicalLinear)}
        self.kept = {name: self._reason(name, module, module is head) for name, module in wanted.items()}
        self._take_inputs({n: m for n, m in wanted.items() if self.kept[n] is None})
        if self.summary_file is not None:
            self._fold_factors()
        super()._mlps()

    def _fold_factors(self) -> None:
        """Let norms and linears multiply by the factors of those that they feed."""
        schemes = {name: Scheme(self.layouts[name], COMPUTE) for name in self.inputs}
        try:
            self.folds = find_folds(self.model, self.plan_, self.inputs, schemes, self.dtype)
        except Exception as error:  # a foreign forward may raise anything
            first = next(iter(str(error).splitlines()), "")
            self.report.add("", "smoothing", reason=f"a trial run failed ({type(error).__name__}: {first})")
        for name in self.inputs:
            if (place := self.folds.places.get(name)) is None:
                self.report.add(name, "smoothing", reason="its input is multiplied: no norm or linear before can do it")
                continue
            self.report.add(name, "smoothing", f"its factors went into {place}")
            codes = self.inputs[name]
            self.inputs[name] = codes._replace(factors=torch.ones_like(codes.factors))

    def _scheme(self, name: str) -> Scheme | None:
        return Scheme(self.layouts[name], COMPUTE) if name in self.inputs else None

    def _by(self, scheme: Scheme) -> str:
        return f"StaticLinear {scheme.layout}, uint8 activations"

    def _gated_schemes(self, full: tuple[str, ...]) -> tuple[Scheme, ...]:
        """Return none where gate and up cannot share a weight: the product of their outputs is one operator then."""
        schemes = tuple(s for s in (self._scheme(n) for n in full) if s is not None)
        joined = len(schemes) == len(full) and all(self._alike(full[0], n) for n in full[:-1])
        return schemes if joined else ()

    def _float_linears(self) -> None:
        """Plan the linears (the last part of a plan without weight-only quantization)."""
        head = self.model.get_output_embeddings()
        self._siblings()
        for name, reason in self.kept.items():
            module = self.modules[name]
            kind = "head" if module is head else "linear"
            if name in self.taken:
                continue
            if reason is None:
                self._static((name,), kind)
            elif reason is not None and isinstance(module, CanonicalLinear):
                raise ValueError(f"{name} holds a quantized weight, but {reason}")
            elif reason is not None:
                self._dense(name, module, kind, reason)

    def _reason(self, name: str, module: nn.Module, head: bool) -> str | None:
        """Return why a linear stays floating point, or None."""
        if (entry := self.static.excluded_by(name)) is not None:
            return f"modules_to_not_convert has {entry!r}"
        if head and not self.static.lm_head:
            return "lm_head=False"
        if not is_linear(module):
            return f"{type(module).__name__} has a forward of its own"
        if name in self.read:
            return "the model reads its weight directly"
        if module.in_features > MOST_INPUTS:  # type: ignore[operator]
            return f"it has {module.in_features} inputs; static INT8 takes at most {MOST_INPUTS}"
        return self._obstacle(module)

    def _take_inputs(self, linears: dict[str, nn.Module]) -> None:
        """Learn how the linears round their input: from the summary, or as they were stored."""
        if self.summary_file is not None:
            for name, layer in read_qconf_summary(self.summary_file, linears).items():
                self.inputs[name], self.layouts[name] = InputCodes.of(layer), weight_layout(layer.weight_scale_dtype)
        for name, module in linears.items():
            if isinstance(module, StoredStaticLinear):
                try:
                    self.inputs[name], self.layouts[name] = module.input_codes(), module.layout
                except RuntimeError as error:
                    raise ValueError(f"{name}: {error}") from None
            self.layouts.setdefault(name, self.static.layout(name))

    def saved_config(self) -> StaticQuantConfig:
        """Return the configuration that a saved model needs."""
        names = {dtype: name for name, dtype in SCALES.items()}
        found = {name: names[layout.scale_dtype] for name, layout in self.layouts.items()}
        return replace(
            self.static, scale_dtypes={k: v for k, v in found.items() if v != self.static.scale_dtype} or None
        )

    def _sibling_group(self, owner: str, module: nn.Module, attributes: tuple[str, ...]) -> None:
        names = [f"{owner}.{a}" if owner else a for a in attributes]
        names = [n for n in names if n in self.layouts and n not in self.taken]
        while names:  # those that round their input alike go together
            alike = [n for n in names if self._alike(n, names[0])]
            names = [n for n in names if n not in alike]
            self._static(tuple(alike), "linear")

    def _alike(self, a: str, b: str) -> bool:
        sizes = [self.modules[n].in_features for n in (a, b)]
        if sizes[0] != sizes[1] or self.layouts[a] != self.layouts[b]:
            return False
        return not self.inputs or self.inputs[a].equals(self.inputs[b])

    def _static(self, names: tuple[str, ...], kind: str) -> None:
        scheme = Scheme(self.layouts[names[0]], COMPUTE)
        by = self._by(scheme)
        if len(names) > 1:
            by += f", one weight for {len(names)} siblings"
        elif kind == "head" and self._tied(self.modules[names[0]]):
            by += " (the embedding that it was tied to stays floating point)"
        self.plan_.steps.append(Step("static", names, schemes=(scheme,)))
        self.taken.update(names)
        for name in names:
            self.report.add(name, kind, by)

    def _unmatched(self) -> None:
        names = [n for n, m in self.modules.items() if isinstance(m, nn.Linear | CanonicalLinear)]
        for entry in self.static.modules_to_not_convert or ():
            if not any(StaticQuantConfig(modules_to_not_convert=[entry]).excluded_by(n) for n in names):
                raise ValueError(f"modules_to_not_convert has {entry!r}, which matches no linear of the model")


class StaticConverter(Converter):
    """Carries out a static plan.

    Args:
        inputs: by name of the linear.
        folds: where their factors went.
        options: of `Converter`.
    """

    def __init__(self, inputs: dict[str, InputCodes], folds: Folds, *options: Any) -> None:
        """Keep the inputs."""
        super().__init__(*options)
        self.calibrated = Calibrated(parameters=folds.parameters)
        self.inputs, self.folds = inputs, folds

    def _rounded(self, name: str, layout: Layout) -> CanonicalLinear:
        """Return a linear in INT8."""
        linear = self.folds.source(name, self.model.get_submodule(name))
        return rounded(linear, self.folds.columns.get(name, self.inputs[name].factors), layout)

    def _gated(self, step: Step) -> None:
        if not step.schemes:
            super()._gated(step)
            return
        owner, *names = step.names
        layouts = [scheme.layout for scheme in step.schemes]
        linears = {n.rpartition(".")[2]: self._rounded(n, each) for n, each in zip(names, layouts, strict=True)}
        last = linears[names[-1].rpartition(".")[2]]
        down = StaticLinear.make(last, self.inputs[names[-1]], layouts[-1])
        self._set(owner, StaticGatedMLP.make(linears, step.activation, self.inputs[names[0]], layouts[0], down))

    def _fold(self, step: Step) -> None:
        _, name, activation = step.names
        layout = step.schemes[0].layout
        self._set(name, StaticLinear.make(self._rounded(name, layout), self.inputs[name], layout, step.activation))
        self._set(activation, nn.Identity())

    def _static(self, step: Step) -> None:
        layout = step.schemes[0].layout
        linears = [self._rounded(name, layout) for name in step.names]
        codes = self.inputs[step.names[0]]
        if len(linears) == 1:
            self._set(step.names[0], StaticLinear.make(linears[0], codes, layout))
            return
        group = StaticGroup.make(linears, codes, layout)
        for index, name in enumerate(step.names):
            self._set(name, StaticSibling(group, index))
