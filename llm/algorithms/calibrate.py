"""Runs a quantization algorithm over a model, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..linear import Canonical, CanonicalLinear, Scheme
from ..memory import FilePages, return_free_memory
from ..plan import Plan
from ..quantization import WeightOnlyQuantConfig
from .autoround import autoround, package
from .awq import Awq
from .calibration import Samples, calibration_samples
from .gptq import Gptq, Rounded
from .walk import Layer, Walk


@dataclass
class Calibrated:
    """What an algorithm found.

    Args:
        linears: full name -> the linear's canonical tensors, instead of its float weight.
        parameters: full name -> new value of a parameter that scales were folded into.
    """

    linears: dict[str, CanonicalLinear] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)


class Method(Protocol):
    """An algorithm."""

    def layer(self, layer: Layer) -> Iterator[tuple[str, Rounded]]:
        """Yield (name in the layer, its rounded weight) for linears of `layer.schemes` and set their weights in layer.module."""

    def folded(self) -> dict[str, Tensor]:
        """Return parameters that changed beside the linears, by full name."""

    def alone(self, name: str, weight: Tensor, scheme: Scheme, moments: Tensor) -> Rounded:
        """Return a linear's rounded weight, given X^T X [K, K] of its inputs."""


@torch.no_grad()
def calibrate(model: Any, plan: Plan, config: WeightOnlyQuantConfig) -> Calibrated:
    """Quantize the linears of a plan by `config.method`; the model is not changed.

    Linears outside of the decoder layers are quantized too if the plan gives them the layout of the others (the head with
    lm_head="int4"); the INT8 head is rounded to nearest. So is a linear that no sample reached; the report says so.

    Raises:
        ValueError: calibration text, tokenizer or layout do not fit, or the model's activations are not finite.
    """
    schemes = _schemes(model, plan, config)
    if config.method == "rtn" or not schemes:
        return Calibrated()
    if config.method == "autoround":
        package()  # before tokens are made
    samples = calibration_samples(model, config)
    if config.method == "autoround":
        result = _autoround(model, schemes, config, samples)
    else:
        result = _layer_by_layer(
            model, schemes, Gptq(config) if config.method == "gptq" else Awq(plan), samples, config.method
        )
    plan.report.add("", "calibration", f"{config.method}, {samples}")
    for name in (step.names[0] for step in plan.steps if step.kind == "experts"):
        plan.report.add(name, "calibration", reason="experts are rounded to nearest")
    for name in schemes.keys() - result.linears.keys():
        plan.report.add(name, "calibration", reason=f"{config.method} did not reach it: rounded to nearest")
    return result


def _autoround(
    model: Any, schemes: Mapping[str, Scheme], config: WeightOnlyQuantConfig, samples: Samples
) -> Calibrated:
    result = Calibrated()
    for name, part in autoround(model, schemes, config, samples, config.tokenizer).items():
        result.linears[name] = _canonical_linear(model, name, schemes, part)
    return result


def _layer_by_layer(
    model: Any, schemes: Mapping[str, Scheme], method: Method, samples: Samples, title: str
) -> Calibrated:
    result, pages = Calibrated(), FilePages(model)
    with _Progress(title, len(schemes)) as progress:
        walk = Walk(model, schemes, samples.tokens)
        for index in range(len(walk)):
            layer = walk.layer(index)
            for name, rounded in method.layer(layer):
                result.linears[layer.full(name)] = _canonical_linear(model, layer.full(name), schemes, rounded)
                progress.advance()
            walk.finish(layer)
            pages.release()
            return_free_memory()
        for name, moments in _outside_moments(walk):
            rounded = method.alone(name, model.get_submodule(name).weight.float(), schemes[name], moments)
            result.linears[name] = _canonical_linear(model, name, schemes, rounded)
            progress.advance()
    result.parameters = method.folded()
    return result


def _schemes(model: Any, plan: Plan, config: WeightOnlyQuantConfig) -> dict[str, Scheme]:
    """Return the schemes of a plan's float linears; the head's only if it has the layout of the others."""
    found: dict[str, Scheme] = {}
    for step in plan.steps:
        linears = [n for n in step.names if isinstance(model.get_submodule(n), nn.Linear)]
        schemes = step.schemes * len(linears) if len(step.schemes) == 1 else step.schemes
        found.update(zip(linears, schemes, strict=False))
    head = model.get_output_embeddings()
    wanted = {n: s for n, s in found.items() if s.layout == config.layout() or model.get_submodule(n) is not head}
    for name, scheme in wanted.items():
        if config.method in ("gptq", "autoround") and scheme.layout.weight_dtype not in ("int4", "int8"):
            raise ValueError(
                f"{name} is to be {scheme.layout}; method {config.method!r} makes 'int4' and 'int8', 'awq' and 'rtn' every format"
            )
    return wanted


def _canonical_linear(
    model: Any, name: str, schemes: Mapping[str, Scheme], rounded: Rounded | Canonical
) -> CanonicalLinear:
    old = model.get_submodule(name)
    new = CanonicalLinear(
        old.in_features, old.out_features, old.bias is not None, schemes[name].layout, old.weight.dtype, "meta"
    )
    bias = None
    if isinstance(rounded, Rounded):
        new.perm, bias, rounded = rounded.perm, rounded.bias, rounded.canonical
    new.qweight, new.scales, new.zeros = rounded
    if old.bias is not None:
        new.bias = nn.Parameter(old.bias.detach() if bias is None else bias, False)
    return new


def _outside_moments(walk: Walk) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, X^T X) of linears outside of the layers."""
    moments: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        if name not in moments:
            moments[name] = torch.zeros(x.shape[1], x.shape[1])
        moments[name].addmm_(x.T, x)

    if names := walk.outside():
        walk.outside_inputs(names, add)
    yield from moments.items()


class _Progress:
    """A bar on stderr, one tick per linear; gone when done."""

    def __init__(self, name: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(name, total=total)

    def advance(self) -> None:
        """Count one linear."""
        self._bar.advance(self._task)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
