"""Whether and how the experts of a layer are quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import nn

from .experts import ExpertSizes, StoredExperts, experts_misfit, is_experts, part_names, sizes_of
from .linear import Scheme
from .mlp import GATED_ACTIVATIONS
from .probe import probe_experts
from .quantization import WeightOnlyQuantConfig


def expert_names(owner: str, module: nn.Module) -> Iterator[str]:
    """Yield the full names of the linears of experts: gate, up and down of each in turn."""
    for names in part_names(_sizes(module).experts):
        yield from (f"{owner}.{name}" for name in names)


def routers(modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the floating-point linears beside experts that choose or weigh them: as many outputs as experts, or one.

    They are small, and what they round to decides which experts a token goes to.
    """
    found: set[str] = set()
    for name, module in modules.items():
        if not isinstance(module, StoredExperts) and not is_experts(module):
            continue
        count = _sizes(module).experts
        inside = name.rpartition(".")[0] + "."
        for other, linear in modules.items():
            beside = other.startswith(inside) and not other.startswith(f"{name}.")
            if beside and isinstance(linear, nn.Linear) and linear.out_features in (1, count):
                found.add(other)
    return found


def _sizes(module: nn.Module) -> ExpertSizes:
    return module.sizes if isinstance(module, StoredExperts) else sizes_of(module)


def kept_experts(config: WeightOnlyQuantConfig | None, name: str, module: nn.Module) -> str | None:
    """Return why the experts called `name` shall stay floating point, or None."""
    if config is None:
        return "floating point: they run as transformers has them"
    for part in (name, *expert_names(name, module)):
        if (entry := config.excluded_by(part)) is not None:
            stored = part in (config.floating_modules or ())
            return "the checkpoint keeps them floating point" if stored else f"modules_to_not_convert has {entry!r}"
    return None


def other_experts(module: nn.Module) -> str | None:
    """Return why a module whose experts are not kept as `is_experts` asks cannot be quantized; None if it holds no experts."""
    named = hasattr(module, "_apply_gate")  # transformers' decorator of such classes sets it
    return f"{type(module).__name__} keeps the weights of its experts in another form" if named else None


def unlike_experts(
    module: nn.Module, activation: str | None, probe: Callable[[nn.Module, str], bool] = probe_experts
) -> str | None:
    """Return why experts do not compute what `QuantExperts` does, or None.

    Args:
        module: as `is_experts` asks; also on the meta device.
        activation: name of its function, None for another one.
        probe: `probe_experts`, or one that remembers its answers.
    """
    if (misfit := experts_misfit(module)) is not None:
        return misfit
    if activation not in GATED_ACTIVATIONS:
        return f"{type(module).__name__}: its activation is not one of {', '.join(GATED_ACTIVATIONS)}"
    if not probe(module, activation):
        return f"{type(module).__name__} does not compute the weighted sum of down({activation}(gate) * up)"
    return None


def expert_schemes(config: WeightOnlyQuantConfig, name: str, module: nn.Module) -> tuple[Scheme, Scheme]:
    """Return the schemes of gate and up, and of down, of the experts called `name`.

    Raises:
        ValueError: they differ between the experts.
    """
    if isinstance(module, StoredExperts):
        try:
            up, down = module.layouts()
        except RuntimeError as error:
            raise ValueError(f"{name}: {error}; such experts cannot be computed") from None
        return Scheme(up, config.compute_for(up)), Scheme(down, config.compute_for(down))
    names = list(expert_names(name, module))
    schemes = []
    for parts in ([n for i, n in enumerate(names) if i % 3 < 2], names[2::3]):
        layouts = {config.layout_of(part) for part in parts}
        layout = layouts.pop()
        if layouts or layout is None:
            raise ValueError(f"layouts has different ones for the experts of {name}; give all of a layer the same")
        schemes.append(Scheme(layout, config.compute_for(layout), config.rounds_fullrange(layout)))
    return schemes[0], schemes[1]
