"""The loader of devices other than the CPU: the one place that imports the room xpu, and only when it is asked for."""

from __future__ import annotations

from types import ModuleType


def xpu_room() -> ModuleType:
    """Return the package `llmrt.xpu`: kernels for Intel GPUs, and what compiles them."""
    from . import xpu

    return xpu
