"""How kernels are started: on the tensors' device, with the block sizes of the table or, if asked for, the fastest of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .blocks import Blocks
from .interpreter import INTERPRETED

_fastest: dict[tuple[Any, ...], Blocks] = {}


def autotuned() -> bool:
    """Return whether LLMRT_TRITON_AUTOTUNE asks to time every candidate at the first call of each shape.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get("LLMRT_TRITON_AUTOTUNE", "").strip()
    if value not in ("", "0", "1"):
        raise ValueError(f"LLMRT_TRITON_AUTOTUNE is {value!r}; valid: 0, 1")
    return value == "1"


def launch(
    kernel: Any,
    choices: tuple[Blocks, ...],
    grid: Callable[[Blocks], tuple[int, ...]],
    shape: tuple[Any, ...],
    *args: Any,
    **constants: Any,
) -> None:
    """Start a kernel.

    Args:
        kernel: a `triton.jit` function; writing its results twice must do no harm, as autotuning does it.
        choices: block sizes, the default first.
        grid: block sizes -> programs; an empty grid starts nothing.
        shape: what the fastest choice depends on.
        args: the kernel's arguments.
        constants: its compile-time arguments other than block sizes, and options of the compiler.
    """

    def start(blocks: Blocks) -> None:
        programs = grid(blocks)
        if 0 not in programs:
            options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
            kernel[programs](*args, **{**options, **constants, **blocks.sizes})

    device = next(a.device for a in args if isinstance(a, Tensor))
    module = contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
    with module:
        if len(choices) > 1 and not INTERPRETED and autotuned():
            key = (kernel.__name__, device, *shape)
            if key not in _fastest:
                _fastest[key] = _time(start, choices)
            start(_fastest[key])
        else:
            start(choices[0])


def _time(start: Callable[[Blocks], None], choices: tuple[Blocks, ...]) -> Blocks:
    """Return the fastest choice; one that the device cannot hold is left out."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times: dict[int, float] = {}
    for i, blocks in enumerate(choices):
        with contextlib.suppress(OutOfResources):
            times[i] = do_bench(lambda: start(blocks), warmup=5, rep=20)  # noqa: B023
    return choices[min(times, key=lambda i: times[i])] if times else choices[0]


def strides(x: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """Return the strides of a tensor, zeros for None."""
    return (0,) * dimensions if x is None else x.stride()


def refuses_double(*tensors: Tensor | None) -> str | None:
    """Return the reason why float64 is refused, if a tensor has it."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return "float64 is for references"
    return None
