"""The loader of devices other than the CPU: the one place that imports the room xpu, and only when it is asked for."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

#: Kinds of devices, and what torch calls them where it lacks them. CUDA is a guest: Triton and torch's own kernels only.
NAMES = {"xpu": "Intel GPUs (XPU)", "cuda": "NVIDIA GPUs (CUDA)"}
#: Kinds of devices that models run on.
ALL = ("cpu", *NAMES)
_installed: dict[str, Any] = {}


def xpu_room() -> ModuleType:
    """Return the package `llmrt.xpu`: kernels for Intel GPUs, and what compiles them."""
    from . import xpu

    return xpu


def check(device: str | torch.device) -> torch.device:
    """Return a device as torch has it.

    Raises:
        ValueError: it is no CPU, XPU or CUDA device.
        RuntimeError: this torch or this machine does not have it, or what its kernels need is missing; the message says what to do.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ALL:
        raise ValueError(f"device is {device!r}; valid: 'cpu', 'xpu', 'cuda', also with a number, such as 'xpu:0'")
    if found.type == "cpu":
        return found
    text, backend = f"device is {str(found)!r}", getattr(torch, found.type)
    built = torch.xpu._is_compiled() if found.type == "xpu" else torch.backends.cuda.is_built()
    if not built:
        raise RuntimeError(
            f"{text}, but this PyTorch ({torch.__version__}) is built without {NAMES[found.type]}; install a build with them"
        )
    if not backend.is_available():
        raise RuntimeError(f"{text}, but PyTorch sees no such device: is there one, and is its driver installed?")
    if found.index is not None and found.index >= backend.device_count():
        raise RuntimeError(f"{text}; this machine has {backend.device_count()} of them, counted from 0")
    if (lack := xpu_room().missing(found.type)) is not None:
        raise RuntimeError(f"{text}, but its kernels cannot run: {lack}")
    return found


def load(device: torch.device) -> None:
    """Register the kernels of a device that `check` has returned, once per process."""
    if device.type != "cpu" and device.type not in _installed:
        _installed[device.type] = xpu_room().install(device.type)
