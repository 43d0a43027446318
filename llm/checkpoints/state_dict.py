"""`optimize(low_precision_checkpoint=...)`: linears of a model get their quantized weights from a state dict."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..expert_plan import expert_names, kept_experts
from ..experts import is_experts
from ..linear import CanonicalLinear
from ..plan import is_linear
from ..quantization import WeightOnlyQuantConfig
from .files import by_prefix, entries_of
from .low_precision import LowPrecisionReader
from .reader import Entry, Reader
from .stored import canonical_linear, check_complete, check_outside, store_experts

#: What is said where the state dict came without a configuration.
ASSUMED = "low_precision_checkpoint has no configuration: the layout of GPTQ (version 1) is assumed"


class TakeOver:
    """Replaces the linears that a state dict has quantized weights for, and can take that back.

    Args:
        model: changed. Its linears may be on the meta device where the state dict has their weights.
        checkpoint: a state dict, or (state dict, configuration); see llm/checkpoints/low_precision.py.
        config: of `optimize`; its modules_to_not_convert stay as they are.

    Attributes:
        note: what the report shall say of the state dict.

    Raises:
        ValueError: a tensor is missing or does not fit the linear, or nothing fits; the model is as it was.
    """

    def __init__(self, model: Any, checkpoint: Any, config: WeightOnlyQuantConfig | None) -> None:
        """Check every tensor first, then read one linear after the other."""
        state, described = _parts(checkpoint)
        self.model, self._replaced = model, dict[str, nn.Module]()
        self.note = f"low-precision checkpoint ({described or 'packed words along K'})"
        if described is None:
            warnings.warn(ASSUMED, UserWarning, stacklevel=4)
            self.note, described = ASSUMED, {"quant_method": "gptq"}
        reader = LowPrecisionReader(described)
        found = by_prefix(entries_of(state, "low_precision_checkpoint"))
        try:
            chosen = self._chosen(reader, found, config)
            for name, prefix in chosen.items():
                self._replace(name, prefix, reader, {key: state[f"{prefix}.{key}"] for key in found[prefix]})
        except BaseException:
            self.undo()
            raise

    def _chosen(
        self, reader: Reader, found: Mapping[str, Mapping[str, Entry]], config: WeightOnlyQuantConfig | None
    ) -> dict[str, str]:
        """Return the linears to replace and their names in the state dict, all checked."""
        kept = self._store_experts(reader, found, config)
        linears = {name: m for name, m in self.model.named_modules() if is_linear(m)}
        chosen: dict[str, str] = {}
        for name, linear in linears.items():
            prefix = next((p for p in _spellings(name, self.model.base_model_prefix) if p in found), None)
            if prefix is None or not reader.quantizes(prefix, found[prefix]):
                continue
            chosen[name] = prefix
            reader.check(prefix, linear.in_features, linear.out_features, found[prefix])
        outside = [
            p for p, parts in found.items() if p not in kept and p not in chosen.values() and reader.quantizes(p, parts)
        ]
        check_outside(outside, self.model)
        if not chosen:
            shown = ", ".join(list(found)[:4]) or "nothing"
            raise ValueError(
                f"low_precision_checkpoint has no quantized weight of a linear of the model: it has tensors of {shown}; "
                f"linears are called {', '.join(list(linears)[:4])}"
            )
        return {name: prefix for name, prefix in chosen.items() if config is None or config.excluded_by(name) is None}

    def _store_experts(
        self, reader: Reader, found: Mapping[str, Mapping[str, Entry]], config: WeightOnlyQuantConfig | None
    ) -> set[str]:
        """Make room for the linears of experts that the state dict has; return its names for those that are not to be converted."""
        kept: set[str] = set()
        for owner, module in list(self.model.named_modules()):
            if not is_experts(module):
                continue
            base = self.model.base_model_prefix
            spellings = [p for name in expert_names(owner, module) for p in _spellings(name, base) if p in found]
            if config is not None and kept_experts(config, owner, module) is not None:
                kept.update(spellings)
            elif any(reader.quantizes(p, found[p]) for p in spellings):
                store_experts(self.model, [owner])
                self._replaced[owner] = module
        return kept

    def _replace(self, name: str, prefix: str, reader: Reader, tensors: Mapping[str, Any]) -> None:
        linear: Any = self.model.get_submodule(name)
        sizes = linear.in_features, linear.out_features
        weight, dtype, bias = reader.read(prefix, *sizes, tensors), linear.weight.dtype, linear.bias
        new = canonical_linear(prefix, weight, *sizes, dtype, bias, bias is not None)
        self._replaced[name] = linear
        self.model.set_submodule(name, new)

    def undo(self) -> None:
        """Put the model's own linears back."""
        for name, module in reversed(self._replaced.items()):
            self.model.set_submodule(name, module)

    def forget(self) -> None:
        """Let the model's own weights go."""
        self._replaced.clear()

    def check_complete(self) -> None:
        """Raise ValueError if a linear without values got none from the state dict, or experts not all of theirs."""
        for name, module in self._replaced.items():
            if is_experts(module):
                check_complete(self.model, name)
        for name, module in self.model.named_modules():
            if not isinstance(module, CanonicalLinear) and any(p.is_meta for p in module.parameters(recurse=False)):
                raise ValueError(f"{name} is on the meta device, and low_precision_checkpoint has no weight for it")


def _parts(checkpoint: Any) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Return state dict and configuration, None where none came."""
    if isinstance(checkpoint, Mapping):
        return checkpoint, None
    if isinstance(checkpoint, tuple | list) and len(checkpoint) == 2:
        state, config = checkpoint
        if isinstance(state, Mapping) and (config is None or isinstance(config, Mapping)):
            return state, config
    raise ValueError(
        f"low_precision_checkpoint is a {type(checkpoint).__name__}; valid: a state dict, or (state dict, configuration)"
    )


def _spellings(name: str, base: str) -> tuple[str, ...]:
    """Return the names that a linear may have in a state dict: with and without the base model's."""
    return name, name.removeprefix(f"{base}."), f"{base}.{name}"
