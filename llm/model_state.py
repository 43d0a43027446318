"""Notices that a model is no longer the one that was looked at: parts, parameters, configuration, hooks, dtypes."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

#: Hooks of this module do nothing unless hidden states or attention weights are asked for.
_IDLE_HOOKS = "transformers.utils.output_capturing"


class ModelState:
    """What a captured graph took from a model without asking again.

    A change of plain attributes (an epsilon, a scale) is not noticed, and neither are hooks of the model itself, which run outside of
    its forward.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look at the model."""
        parts = list(model.modules())
        self._attributes = [(m, dict(m.__dict__)) for m in parts]
        held: list[dict[str, Any]] = [d for m in parts for d in (m._parameters, m._buffers, m._modules)]
        self._contents = [(d, dict(d)) for d in held]
        config: dict[str, Any] = model.config.__dict__  # type: ignore[assignment, union-attr]
        self._dicts = [*filter(None, held), config]
        self._values = list(self._now())
        self._tensors = [v for v in self._values if isinstance(v, torch.Tensor)]
        self._kinds = [(t.dtype, t.device, t.shape) for t in self._tensors]
        inner = parts[1:]
        self._hooks = [hooks for m in inner for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]

    def _now(self) -> Any:
        return chain.from_iterable(d.values() for d in self._dicts)

    def changed(self, thoroughly: bool) -> bool:
        """Return whether parts, parameters or configuration were replaced.

        Args:
            thoroughly: look at dtypes and shapes of parameters, which `half()` changes in place, and for modules that were given
                another forward, too.
        """
        now = list(self._now())
        if len(now) != len(self._values) or not all(map(is_, now, self._values)):
            return True
        if not thoroughly:
            return False
        if [(t.dtype, t.device, t.shape) for t in self._tensors] != self._kinds:
            return True
        return any(m.__dict__.get("forward") is not old.get("forward") for m, old in self._attributes)

    def hooked(self) -> bool:
        """Return whether a part has a forward hook that may do something."""
        if not any(self._hooks):
            return False
        return any(hook.__module__ != _IDLE_HOOKS for hooks in self._hooks for hook in hooks.values())

    def restore(self) -> list[str]:
        """Undo changes of attributes and buffers since; return the names of what had changed."""
        changed = []
        for module, old in self._attributes:
            new = module.__dict__
            if len(new) != len(old) or any(new.get(key, self) is not value for key, value in old.items()):
                changed += [f"{type(module).__name__}.{k}" for k in new if new[k] is not old.get(k, self)]
                new.clear()
                new.update(old)
        for held, before in self._contents:
            if len(held) != len(before) or not all(map(is_, held.values(), before.values())):
                changed += [key for key in held if held[key] is not before.get(key, self)]
                held.clear()
                held.update(before)
        return changed
