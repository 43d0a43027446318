"""Registers the routes of the table as implementations of the operators for a device, and keeps what fell to a reference."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..ops.operator import OPERATORS
from .route import KINDS, UNAVAILABLE, import_routes
from .table import candidates, choose, forced_kind

#: Dispatch keys of the devices, and the kinds of routes that each can run. The CPU is for tests: SYCL has a CPU device, Triton an
#: interpreter.
DEVICES = {"xpu": ("XPU", KINDS), "cuda": ("CUDA", ("triton", "torch")), "cpu": ("CPU", KINDS)}


@dataclass(frozen=True)
class Fallback:
    """A call that ran an operator's reference because no route served it.

    Args:
        device: "xpu", "cuda" or "cpu".
        operator: its name.
        reason: why.
    """

    device: str
    operator: str
    reason: str


_fallbacks: Counter[Fallback] = Counter()


def fallbacks() -> dict[Fallback, int]:
    """Return what ran as a reference in this process so far, with the number of calls."""
    return dict(_fallbacks)


class Installed:
    """The registration of one device's kernels; `remove` (or leaving ``with``) takes it back."""

    def __init__(self, device: str, forced: str | None, strict: bool) -> None:
        """Register an implementation of every operator that chooses a route at each call."""
        self.device, self.forced, self.strict = device, forced, strict
        self.calls: Counter[tuple[str, str]] = Counter()
        key, kinds = DEVICES[device]
        self._library = torch.library.Library("llmrt", "IMPL", key)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            for name in OPERATORS:
                self._library.impl(name, self._implementation(name, kinds), key, allow_override=True)

    def _implementation(self, name: str, kinds: tuple[str, ...]) -> Callable[..., Any]:
        rows, reference = tuple(candidates(name, kinds, self.forced)), OPERATORS[name].reference

        def implementation(*args: Any, **kwargs: Any) -> Any:
            route, reason = choose(rows, *args, **kwargs)
            if route is not None:
                self.calls[name, route.kind] += 1
                return route.run(*args, **kwargs)
            self._fall_back(name, reason)
            return reference(*args, **kwargs)

        return implementation

    def _fall_back(self, name: str, reason: str) -> None:
        if self.forced == "reference":
            reason = "LLMRT_XPU_KERNELS is 'reference'"
        fallback = Fallback(self.device, name, reason)
        _fallbacks[fallback] += 1
        self.calls[name, "reference"] += 1
        if self.strict:
            raise RuntimeError(f"llmrt: no kernel of {name} for {self.device} serves this call: {reason}")
        if _fallbacks[fallback] == 1:
            warnings.warn(
                f"llmrt: {name} runs its slow reference on {self.device}: {reason}", RuntimeWarning, stacklevel=4
            )

    def remove(self) -> None:
        """Restore what was registered before."""
        self._library._destroy()

    def __enter__(self) -> Installed:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Take the registration back."""
        self.remove()


def missing(device: str) -> str | None:
    """Return what keeps every kind of our kernels from running on a device, and how to get it; None if one kind can run.

    Args:
        device: "xpu", "cuda" or "cpu".
    """
    import_routes()
    own = [kind for kind in DEVICES[device][1] if kind != "torch"]
    lacking = [f"{kind}: {UNAVAILABLE[kind]}" for kind in own if kind in UNAVAILABLE]
    return "; ".join(lacking) if len(lacking) == len(own) else None


def install(device: str, forced: str | None = None, strict: bool = False) -> Installed:
    """Register the kernels of a device.

    Args:
        device: "xpu"; "cuda" (a guest: Triton and torch only); "cpu" (tests: the same kernels on SYCL's CPU device and in Triton's
            interpreter).
        forced: "sycl", "triton", "torch" or "reference" for every call; None: the environment variable LLMRT_XPU_KERNELS, or else
            what the table says.
        strict: a call that no route serves raises RuntimeError; otherwise it runs the reference, warns once and is counted.

    Returns:
        The registration, whose `calls` counts calls by operator and kind.

    Raises:
        ValueError: device or forced has another value.
    """
    if device not in DEVICES:
        raise ValueError(f"device is {device!r}; valid: {', '.join(DEVICES)}")
    forced = forced or forced_kind()
    if forced is not None and forced not in (*KINDS, "reference"):
        raise ValueError(f"forced is {forced!r}; valid: {', '.join((*KINDS, 'reference'))}")
    import_routes()
    return Installed(device, forced, strict)
