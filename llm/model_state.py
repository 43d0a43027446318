"""Notices that a model is no longer the one that was captured, and undoes what a capture changed in it."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

#: Hooks of this module do nothing unless hidden states or attention weights are asked for.
_IDLE_HOOKS = "transformers.utils.output_capturing"


def _held(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


class ModelState:
    """What a captured graph took from a model without asking again: parts, parameters and configuration.

    A change of plain attributes (an epsilon, a scale) is not noticed, and neither are hooks of the model itself, which run outside of
    its forward.
    """

    def __init__(self, model: Any) -> None:
        """Look at the model."""
        parts = list(model.modules())
        self._model, self._config = model.__dict__, model.config
        configs = {id(c): vars(c) for c in (self._config, self._config.get_text_config(decoder=True))}
        self._dicts = [*filter(None, (held for part in parts for held in _held(part))), *configs.values()]
        self._values = list(self._now())
        self._tensors = [v for v in self._values if isinstance(v, torch.Tensor)]
        self._kinds = [(t.dtype, t.device, t.shape) for t in self._tensors]
        self._forwards = [(part.__dict__, part.__dict__.get("forward")) for part in parts]
        self._hooks = [hooks for part in parts[1:] for hooks in (part._forward_hooks, part._forward_pre_hooks)]
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
        if self._model["config"] is not self._config:
            return True
        if len(now) != len(self._values) or not all(map(is_, now, self._values)):
            return True
        if not thoroughly:
            return False
        if [(t.dtype, t.device, t.shape) for t in self._tensors] != self._kinds:
            return True
        return any(attributes.get("forward") is not forward for attributes, forward in self._forwards)

    def hooked(self) -> bool:
        """Return whether a part has a forward hook that may do something."""
        if not any(self._hooks):
            return False
        return any(hook.__module__ != _IDLE_HOOKS for hooks in self._hooks for hook in hooks.values())


class Snapshot:
    """Attributes, parameters and buffers of all parts, to be put back: fake tensors must not stay in a model."""

    def __init__(self, model: nn.Module) -> None:
        """Note the objects."""
        parts = list(model.modules())
        self._before = [(type(m).__name__, d, dict(d)) for m in parts for d in (m.__dict__, *_held(m))]

    def restore(self) -> list[str]:
        """Put everything back; return the names of what had changed."""
        changed = []
        for owner, held, before in self._before:
            if len(held) != len(before) or not all(map(is_, held.values(), before.values())):
                changed += [f"{owner}.{key}" for key in held if held[key] is not before.get(key, self)]
                held.clear()
                held.update(before)
        return changed
