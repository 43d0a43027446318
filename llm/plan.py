"""Decides what `optimize` will replace, and checks everything that could fail, before anything is changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from . import probe, trial
from .cache_setup import CacheSetup
from .expert_plan import expert_names, expert_schemes, kept_experts, other_experts, routers, unlike_experts
from .experts import StoredExperts, is_experts, sizes_of
from .families import FAMILIES, Family, Gated, GatedFused, Plain, find_family
from .linear import CanonicalLinear, Scheme, perm_of, same_perm
from .mlp import GATED_ACTIVATIONS
from .norm import is_layer_norm, rms_norm_eps
from .quantization import WeightOnlyQuantConfig
from .report import OptimizationReport
from .rope import Rotation, called_rotation


@dataclass(frozen=True)
class Step:
    """One replacement.

    Args:
        kind: norm, rope, positions, experts, gated, fold, group, linear, dense: what llm/convert.py does.
        names: full names of the modules; for gated and fold the owner comes first.
        offset: of an RMS norm; None for a layer norm.
        function: global name of the rotation.
        style: of the rotation.
        activation: of an MLP.
        schemes: of the linears, one per linear (of experts: gate and up, down); empty when they stay floating point.
    """

    kind: str
    names: tuple[str, ...]
    offset: float | None = None
    function: str = ""
    style: str = ""
    activation: str = ""
    schemes: tuple[Scheme, ...] = ()


@dataclass
class Plan:
    """Steps in order, and the report that is true once they are done.

    Args:
        attention: whether llmrt's attention will be set; None: to be tried out when the weights are packed.
        cache: whether generate will get a `KVCache`.
    """

    report: OptimizationReport
    steps: list[Step] = field(default_factory=list)
    attention: bool | None = False
    cache: bool = False
    quantization: WeightOnlyQuantConfig | None = None


def is_linear(module: nn.Module | None) -> bool:
    """Return whether a module is a plain linear layer, or one as a checkpoint stores it."""
    return isinstance(module, CanonicalLinear) or (
        isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    )


class Planner:
    """Walks a model once per seam; `plan()` gives the result."""

    operator = "quant_linear"  # of the linears that are quantized

    def __init__(self, model: Any, quantization: WeightOnlyQuantConfig | None) -> None:
        """Find the model's row."""
        self.model = model
        self.quantization = quantization
        config = model.config.get_text_config(decoder=True)
        self.family = find_family(config.model_type)
        #: Rows whose names may apply: the model's own, or all of them, each claim subject to its probe.
        self.rows: list[Family] = [self.family] if self.family else list(FAMILIES.values())
        self.report = OptimizationReport(self.family.model_type if self.family else None, config.model_type)
        self.plan_ = Plan(self.report, quantization=quantization)
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        seen: dict[int, int] = {}
        for _, module in model.named_modules(remove_duplicate=False):
            seen[id(module)] = seen.get(id(module), 0) + 1
        self.shared = {key for key, count in seen.items() if count > 1}
        self.probed: dict[Any, Any] = {}
        self.taken: set[str] = set()  # linears that an MLP or group uses
        self.read: set[str] = set()  # linears whose weight the model reads itself
        self.routers = routers(self.modules)

    def plan(self) -> Plan:
        """Return the plan."""
        self._attention()
        self._norms()
        self._rotations()
        self._positions()
        self._experts()
        self._mlps()
        if self.quantization is not None:
            self._siblings()
            self._linears()
            self._unmatched_names()
        else:
            self._float_linears()
        return self.plan_

    def _once(self, key: Any, function: Callable[[], Any]) -> Any:
        """Return function(), asked once per key: a probe's result holds for a class."""
        if key not in self.probed:
            self.probed[key] = function()
        return self.probed[key]

    def _attention(self) -> None:
        """Plan attention interface and cache; a model without a row is tried out first."""
        model = self.model
        stored = any(isinstance(m, CanonicalLinear) for m in self.modules.values())
        reason = None
        if self.family is None and not stored:
            read = trial.directly_read(model)
            reason = read if isinstance(read, str) else None
            self.read = set() if isinstance(read, str) else read
        if model.config.is_encoder_decoder or not model._can_set_attn_implementation():
            reason = f"{type(model).__name__} does not go through transformers' attention interface"
        elif self.family is None and stored:
            self.plan_.attention = None
            return
        elif self.family is None:
            reason = reason or trial.attention_misfit(model)
        settle_attention(self.plan_, model, reason)

    def _obstacle(self, module: nn.Module) -> str | None:
        """Return why a module may not be swapped at all, or None."""
        if id(module) in self.shared:
            return "the module is used in several places"
        if module._forward_hooks or module._forward_pre_hooks:
            return "the module has forward hooks"
        return None

    def _norms(self) -> None:
        offsets = {"rms": 0.0, "rms_offset": 1.0}
        wanted = [offsets[r.norm] for r in self.rows if r.norm in offsets]
        for name, module in self.modules.items():
            if is_layer_norm(module):
                step, by = Step("norm", (name,)), "ops.layer_norm"
            elif rms_norm_eps(module) is not None:
                offset = self._rms_offset(module, wanted)
                if offset is None:
                    reason = f"{type(module).__name__} does not compute an RMS norm of a known form"
                    self.report.add(name, "norm", reason=reason, expected=False)
                    continue
                step, by = Step("norm", (name,), offset=offset), "ops.rms_norm"
            else:
                continue
            self._add(step, module, "norm", by)

    def _rms_offset(self, module: nn.Module, offsets: list[float]) -> float | None:
        """Return which of the offsets makes the module an RMS norm, or None."""
        for offset in dict.fromkeys(offsets):
            key = (type(module), rms_norm_eps(module), offset)
            if self._once(key, partial(probe.probe_rms_norm, module, offset)):
                return offset
        return None

    def _add(self, step: Step, module: nn.Module, kind: str, by: str) -> bool:
        obstacle = self._obstacle(module)
        self.report.add(step.names[0], kind, None if obstacle else by, obstacle, expected=obstacle is None)
        if obstacle is None:
            self.plan_.steps.append(step)
        return obstacle is None

    def _rotations(self) -> None:
        for name, module in self.modules.items():
            for function, styles in self._rotation_names().items():
                found = called_rotation(type(module), function)
                if found is None:
                    continue
                if isinstance(found, str):
                    self.report.add(name, "rope", reason=found, expected=False)
                    continue
                style = self._style(found, styles)
                if style is None:
                    reason = f"{function} of {type(module).__module__} is not a rotation of a known style"
                    self.report.add(name, "rope", reason=reason, expected=False)
                    continue
                self.plan_.steps.append(Step("rope", (name,), function=function, style=style))
                self.report.add(name, "rope", f"ops.rope ({style})")
        if self.family and self.family.rope and not any(s.kind == "rope" for s in self.plan_.steps):
            reason = f"no attention module calls {self.family.rope_function}"
            self.report.add("", "rope", reason=reason, expected=False)

    def _style(self, rotation: Rotation, styles: list[str]) -> str | None:
        for style in styles:
            if self._once((rotation, style), partial(probe.probe_rotation, rotation, style)):
                return style
        return None

    def _rotation_names(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for row in self.rows:
            if row.rope and row.rope not in names.setdefault(row.rope_function, []):
                names[row.rope_function].append(row.rope)
        return names

    def _positions(self) -> None:
        names = {row.positions for row in self.rows if row.positions}
        for name, module in self.modules.items():
            if name.rpartition(".")[2] in names and isinstance(module, nn.Embedding):
                self.plan_.steps.append(Step("positions", (name,)))
                self.report.add(name, "positions", "a table that names itself when a sequence is too long")
            elif isinstance(module, nn.Embedding):
                self.report.add(name, "embedding", reason="a table look-up: stays as it is")

    def _owners(self, attributes: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
        """Yield modules that have linears under all these attribute names."""
        for name, module in self.modules.items():
            if all(is_linear(module._modules.get(a)) for a in attributes):
                yield name, module

    def _experts(self) -> None:
        """Plan the experts of mixture-of-experts layers: one module with one weight for all of them."""
        for name, module in self.modules.items():
            if not isinstance(module, StoredExperts) and not is_experts(module):
                if self.quantization is not None and (reason := other_experts(module)) is not None:
                    self.report.add(name, "experts", reason=reason, expected=False)
                continue
            stored = module if isinstance(module, StoredExperts) else None
            if stored is not None:  # its linears are no layers of their own
                self.taken.update(f"{name}.{part}" for part, _ in module.named_modules())
            kept = kept_experts(self.quantization, name, module)
            activation = self._activation(module, "act_fn") if stored is None else stored.activation
            checked = stored is not None or kept is not None
            misfit = None if checked else unlike_experts(module, activation, self._probe_experts)
            if kept is not None or misfit is not None:
                self.report.add(name, "experts", reason=kept or misfit, expected=misfit is None)
                continue
            assert self.quantization is not None
            schemes = expert_schemes(self.quantization, name, module)
            layouts = ", ".join(dict.fromkeys(str(s.layout) for s in schemes))
            step = Step("experts", (name,), activation=activation or "", schemes=schemes)
            self._add(step, module, "experts", f"ops.quant_experts {layouts}")

    def _probe_experts(self, module: nn.Module, activation: str) -> bool:
        key = ("experts", type(module), activation, *sizes_of(module))
        return bool(self._once(key, partial(probe.probe_experts, module, activation)))

    def _mlps(self) -> None:
        for kind in dict.fromkeys(row.mlp for row in self.rows):
            if isinstance(kind, Plain):
                self._plain(kind)
            else:
                self._gated(kind)

    def _gated(self, kind: Gated | GatedFused) -> None:
        names = (kind.gate, kind.up, kind.down) if isinstance(kind, Gated) else (kind.gate_up, kind.down)
        for owner, module in self._owners(names):
            full = tuple(_join(owner, n) for n in names)
            if self.taken.intersection(full):
                continue
            activation = self._activation(module, kind.activation)
            if activation not in GATED_ACTIVATIONS:
                self._remark(owner, f"its activation is not one of {', '.join(GATED_ACTIVATIONS)}")
                continue
            key = (type(module), names, activation)
            if not self._once(key, partial(probe.probe_gated, module, names, activation)):
                self._remark(owner, f"{type(module).__name__} does not compute down({activation}(gate) * up)")
                continue
            schemes = self._gated_schemes(full)
            if isinstance(schemes, str):
                self._remark(owner, schemes, expected=True)
                continue
            by = f"ops.{activation}_mul".replace("_tanh", "")
            if schemes:
                by = f"ops.{self.operator} (epilogue {activation}_mul)"
            step = Step("gated", (owner, *full), activation=activation, schemes=schemes)
            hooked = next((o for n in full if (o := self._obstacle(self.modules[n])) is not None), None)
            if hooked is not None:
                self._remark(owner, f"of one of its linears: {hooked}")
            elif self._add(step, module, "mlp", by):
                for linear, scheme in zip(full, schemes, strict=False):
                    inside = "" if linear == full[-1] else f", epilogue {activation}_mul"
                    self.report.add(linear, "linear", self._by(scheme) + inside)
                self.taken.update(full if schemes else ())

    def _by(self, scheme: Scheme) -> str:
        """Return what the report calls a quantized linear."""
        return f"QuantLinear {scheme.layout}"

    def _gated_schemes(self, full: tuple[str, ...]) -> tuple[Scheme, ...] | str:
        """Return the schemes of a gated MLP's linears, none if they stay as they are, or why they are not joined."""
        schemes = tuple(s for s in (self._scheme(n) for n in full) if s is not None)
        apart = None if self.quantization is None else self._apart(full, schemes)
        return schemes if apart is None else apart

    def _apart(self, full: tuple[str, ...], schemes: tuple[Scheme, ...]) -> str | None:
        """Return why gate and up cannot share a packed weight, or None."""
        if len(schemes) < len(full):
            return "modules_to_not_convert keeps some of its linears"
        first = perm_of(self.modules[full[0]])
        if len(set(schemes[:-1])) > 1 or not all(same_perm(first, perm_of(self.modules[n])) for n in full[:-1]):
            return "its gate and up are stored in different formats"
        return None

    def _plain(self, kind: Plain) -> None:
        for owner, module in self._owners((kind.first, kind.second)):
            full = (_join(owner, kind.first), _join(owner, kind.second))
            if self.taken.intersection(full):
                continue
            scheme = self._scheme(full[0])
            if scheme is None:
                if self.quantization is None:
                    self.report.add(owner, "mlp", reason="floating point: the activation is joined in graphs")
                continue
            activation = self._activation(module, kind.activation)
            key = (type(module), kind)
            if activation is None or kind.activation not in module._modules:
                self._remark(owner, f"its activation is not one of {', '.join(probe.ACTIVATIONS)}")
            elif not self._once(key, partial(probe.probe_fold, module, kind.first, kind.activation, kind.second)):
                self._remark(owner, f"{type(module).__name__} does more between its linears than the activation")
            elif (obstacle := self._obstacle(module._modules[kind.first])) is not None:  # type: ignore[arg-type]
                self._remark(owner, obstacle)
            else:
                names = (owner, full[0], _join(owner, kind.activation))
                self.plan_.steps.append(Step("fold", names, activation=activation, schemes=(scheme,)))
                self.report.add(full[0], "linear", f"{self._by(scheme)}, epilogue {activation}")
                self.taken.add(full[0])

    def _remark(self, owner: str, reason: str, expected: bool = False) -> None:
        self.report.add(owner, "mlp", reason=reason, expected=expected)

    def _activation(self, module: nn.Module, attribute: str) -> str | None:
        function = getattr(module, attribute, None)
        if function is None:
            return None
        return self._once(("activation", type(function), repr(function)), partial(probe.probe_activation, function))

    def _scheme(self, name: str) -> Scheme | None:
        """Return how a linear is quantized, or None when it stays floating point."""
        config, module = self.quantization, self.modules[name]
        if config is None or name in self.read or config.excluded_by(name) is not None:
            return None
        if name in self.routers and name not in (config.layouts or {}):
            return None
        if isinstance(module, CanonicalLinear):
            return Scheme(module.layout, config.compute_for(module.layout))
        layout = config.layout_of(name, module is self.model.get_output_embeddings())
        return None if layout is None else Scheme(layout, config.compute_for(layout), config.rounds_fullrange(layout))

    def _siblings(self) -> None:
        groups = dict.fromkeys(row.siblings for row in self.rows if row.siblings)
        gates = dict.fromkeys((r.mlp.gate, r.mlp.up) for r in self.rows if isinstance(r.mlp, Gated))
        for attributes in (*groups, *gates):
            for owner, module in self._owners(attributes):
                self._sibling_group(owner, module, attributes)

    def _sibling_group(self, owner: str, module: nn.Module, attributes: tuple[str, ...]) -> None:
        """Plan one weight for those of the linears that are stored alike."""
        alike: list[tuple[Scheme, list[str]]] = []
        for name in (_join(owner, a) for a in attributes):
            scheme = self._scheme(name)
            if scheme is None or name in self.taken or self._obstacle(self.modules[name]) is not None:
                continue
            found = next((names for s, names in alike if s == scheme and self._same_input(names[0], name)), None)
            if found is None:
                alike.append((scheme, found := []))
            found.append(name)
        for scheme, names in alike:
            if len(names) < 2:
                continue
            self.plan_.steps.append(Step("group", tuple(names), schemes=(scheme,)))
            self.taken.update(names)
            for name in names:
                self.report.add(name, "linear", f"QuantLinear {scheme.layout}, one weight for {len(names)} siblings")

    def _same_input(self, a: str, b: str) -> bool:
        first, second = self.modules[a], self.modules[b]
        return first.in_features == second.in_features and same_perm(perm_of(first), perm_of(second))

    def _linears(self) -> None:
        head = self.model.get_output_embeddings()
        for name, module in self.modules.items():
            if name in self.taken or not isinstance(module, nn.Linear | CanonicalLinear):
                continue
            kind = "head" if module is head else "linear"
            assert self.quantization is not None
            scheme = self._scheme(name)
            if (entry := self.quantization.excluded_by(name)) is not None:
                stored = name in (self.quantization.floating_modules or ())
                reason = "the checkpoint keeps it floating point" if stored else f"modules_to_not_convert has {entry!r}"
                self._dense(name, module, kind, reason)
            elif not is_linear(module):
                reason = f"{type(module).__name__} has a forward of its own"
                self.report.add(name, kind, reason=reason, expected=False)
            elif name in self.read:
                self.report.add(name, kind, reason="the model reads its weight directly", expected=False)
            elif scheme is None:
                reason = "it chooses or weighs experts" if name in self.routers else "lm_head=False"
                self._dense(name, module, kind, reason)
            else:
                by = f"QuantLinear {scheme.layout}"
                if kind == "head" and self._tied(module):
                    by += " (the embedding that it was tied to stays floating point)"
                self._add(Step("linear", (name,), schemes=(scheme,)), module, kind, by)

    def _tied(self, head: nn.Module) -> bool:
        embedding = self.model.get_input_embeddings()
        return getattr(head, "weight", None) is getattr(embedding, "weight", 0)

    def _float_linears(self) -> None:
        head = self.model.get_output_embeddings()
        for name, module in self.modules.items():
            if isinstance(module, CanonicalLinear):
                raise ValueError(f"{name} holds a quantized checkpoint; pass its quantization_config")
            if isinstance(module, nn.Linear):
                self._dense(name, module, "head" if module is head else "linear")

    def _dense(self, name: str, module: nn.Module, kind: str, reason: str | None = None) -> None:
        """Let a linear stay floating point; reason: why."""
        if type(module) is nn.Linear:
            self.plan_.steps.append(Step("dense", (name,)))
            self.report.add(name, kind, "ops.dense_linear", reason)
        else:
            own = f"{type(module).__name__} is a class of its own; graphs run it by ops.dense_linear"
            self.report.add(name, kind, reason="; ".join(filter(None, (reason, own))))

    def _unmatched_names(self) -> None:
        assert self.quantization is not None
        names = [n for n, m in self.modules.items() if isinstance(m, nn.Linear | CanonicalLinear)]
        for name, module in self.modules.items():
            if is_experts(module):
                names += [name, *expert_names(name, module)]
        for name in self.quantization.layouts or ():
            if name not in names:
                raise ValueError(f"layouts has {name!r}, which is no linear of the model")
        for entry in self.quantization.modules_to_not_convert or ():
            alone = WeightOnlyQuantConfig(modules_to_not_convert=[entry])
            if not any(alone.excluded_by(n) for n in names):
                raise ValueError(f"modules_to_not_convert has {entry!r}, which matches no linear of the model")


def settle_attention(plan: Plan, model: Any, reason: str | None) -> None:
    """Enter into plan and report whether attention and cache are used; reason: why not."""
    plan.attention = reason is None
    plan.report.add("", "attention", "ops.attention" if reason is None else None, reason, expected=reason is None)
    prepare = getattr(type(model), "_prepare_cache_for_generation", None)
    wanted = list(inspect.signature(CacheSetup.__call__).parameters)
    if reason is not None:
        plan.report.add("", "cache", reason="needs llmrt's attention", expected=False)
    elif prepare is None or list(inspect.signature(prepare).parameters) != wanted:
        plan.report.add("", "cache", reason="this transformers release prepares caches in another way", expected=False)
    else:
        plan.cache = True
        plan.report.add("", "cache", "KVCache in generate")


def _join(owner: str, attribute: str) -> str:
    return f"{owner}.{attribute}" if owner else attribute
