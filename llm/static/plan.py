"""Decides which linears become static INT8, and makes them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from torch import nn

from ...ops.formats import Layout
from ...ops.static_linear import MOST_INPUTS
from ..convert import Converter
from ..families import Plain
from ..linear import CanonicalLinear, Scheme
from ..plan import Planner, Step, is_linear
from .config import SCALES, StaticQuantConfig, weight_layout
from .linear import COMPUTE, InputCodes, StaticGroup, StaticLinear, StaticSibling, StoredStaticLinear
from .summary import read_qconf_summary


class StaticPlanner(Planner):
    """As for floating point, but linears get steps of the kind "static".

    Args:
        model: floating point, or as an llmrt-static checkpoint was loaded.
        config: of the quantization.
        summary: of the calibration; None for a model that is to be calibrated, or was loaded.
    """

    def __init__(self, model: Any, config: StaticQuantConfig, summary: str | os.PathLike[str] | None = None) -> None:
        """Look at the linears and read the summary of those that will be static."""
        super().__init__(model, None)
        self.plan_.quantization = config
        self.static = config
        self.summary_file = summary
        self.inputs: dict[str, InputCodes] = {}
        self.layouts: dict[str, Layout] = {}

    def _plain(self, kind: Plain) -> None:
        for owner, _ in self._owners((kind.first, kind.second)):
            self.report.add(owner, "mlp", reason="static INT8: the activation is an operator of its own")

    def _float_linears(self) -> None:
        """Plan the linears (the last part of a plan without weight-only quantization)."""
        self._unmatched()
        head = self.model.get_output_embeddings()
        wanted = {n: m for n, m in self.modules.items() if isinstance(m, nn.Linear | CanonicalLinear)}
        kept = {name: self._reason(name, module, module is head) for name, module in wanted.items()}
        self._take_inputs({n: m for n, m in wanted.items() if kept[n] is None})
        self._siblings()
        for name, module in wanted.items():
            kind, reason = "head" if module is head else "linear", kept[name]
            if reason is None and name not in self.taken:
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
        layout = self.layouts[names[0]]
        by = f"StaticLinear {layout}, uint8 activations"
        if len(names) > 1:
            by += f", one weight for {len(names)} siblings"
        elif kind == "head" and self._tied(self.modules[names[0]]):
            by += " (the embedding that it was tied to stays floating point)"
        self.plan_.steps.append(Step("static", names, schemes=(Scheme(layout, COMPUTE),)))
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
        options: of `Converter`.
    """

    def __init__(self, inputs: dict[str, InputCodes], *options: Any) -> None:
        """Keep the inputs."""
        super().__init__(*options)
        self.inputs = inputs

    def _static(self, step: Step) -> None:
        linears = [self.model.get_submodule(name) for name in step.names]
        codes, layout = self.inputs[step.names[0]], step.schemes[0].layout
        if len(linears) == 1:
            self._set(step.names[0], StaticLinear.make(linears[0], codes, layout))
            return
        group = StaticGroup.make(linears, codes, layout)
        for index, name in enumerate(step.names):
            self._set(name, StaticSibling(group, index))
