"""Moves a model from the CPU to the device that it shall run on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import devices
from .memory import FilePages, return_free_memory


def move(model: nn.Module, device: torch.device) -> None:
    """Move every parameter and buffer, and register the device's kernels; on the CPU nothing happens.

    Tensors go one by one, and each is let go before the next one, so that the host needs no memory beside the model's own. They are
    replaced, as another model may share them; what is tied stays tied.

    Args:
        model: on the CPU, optimized.
        device: from `devices.check`.
    """
    if device.type == "cpu":
        return
    devices.load(device)
    pages = FilePages(model)
    moved: dict[
        int, Tensor
    ] = {}  # by what they were; those are all older than any of these, so that no number comes twice
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name in [name for name, tensor in held.items() if tensor is not None]:
                key = id(held[name])
                if key not in moved:
                    moved[key] = _moved(held[name], device)
                held[name] = moved[key]  # type: ignore[assignment]
        pages.release()
    return_free_memory()


def _moved(tensor: Any, device: torch.device) -> Tensor:
    there = transferred(tensor.detach(), device)
    return nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there


def transferred(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor's copy on a device."""
    return tensor.to(device)


def chosen_device(device: Any, device_map: Any) -> tuple[torch.device, Any]:
    """Return the device that a model shall run on, and what is left of a device_map for transformers, which loads on the CPU.

    Args:
        device: as `devices.check` takes it, or None.
        device_map: of transformers: None, a device, "auto" (the CPU), or a dict whose values all are the same one.

    Raises:
        ValueError: they name several devices, or something else.
        RuntimeError: the device is absent.
    """
    named = {str(d) for d in device_map.values()} if isinstance(device_map, Mapping) else {str(device_map)}
    named -= {"None", "auto"}
    if len(named | ({str(device)} if device is not None else set())) > 1:
        raise ValueError(
            f"device is {device!r} and device_map {device_map!r}; a model runs on one device: pass device alone"
        )
    only = device if device is not None else next(iter(named), "cpu")
    found = devices.check(only)
    return found, device_map if found.type == "cpu" else None
