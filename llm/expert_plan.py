"""Whether and how the experts of a layer are quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from .experts import ExpertSizes, StoredExperts, is_experts, part_names, sizes_of
from .linear import Scheme
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
            if other.startswith(inside) and isinstance(linear, nn.Linear) and linear.out_features in (1, count):
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
