"""A route: one implementation of an operator, and what it says about a call that it cannot serve."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

#: SYCL kernels of our own, Triton kernels of our own, compositions of torch's own operators.
KINDS = ("sycl", "triton", "torch")

F = TypeVar("F", bound=Callable[..., Any])


def _serves_all(*args: Any, **kwargs: Any) -> None:
    return None


@dataclass(frozen=True)
class Route:
    """An implementation of an operator.

    Args:
        operator: name of the operator in `llmrt.ops`.
        kind: one of `KINDS`.
        run: takes the operator's arguments, returns its result.
        refuses: takes the same arguments, returns why this route cannot serve them, or None if it can.
    """

    operator: str
    kind: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None]


#: Kinds that this machine cannot run, and why.
UNAVAILABLE: dict[str, str] = {}

#: Every route by operator and kind; importing the modules of xpu/sycl and xpu/triton fills it.
ROUTES: dict[tuple[str, str], Route] = {}


def route(kind: str, operator: str, refuses: Callable[..., str | None] = _serves_all) -> Callable[[F], F]:
    """Return a decorator that registers a function as the route of one kind for an operator.

    Args:
        kind: one of `KINDS`.
        operator: its name in `llmrt.ops`.
        refuses: see `Route`; without it the route serves every call.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; valid: {', '.join(KINDS)}")

    def register(function: F) -> F:
        ROUTES[operator, kind] = Route(operator, kind, function, refuses)
        return function

    return register


def import_routes() -> None:
    """Import torch's routes and every module of xpu/sycl and xpu/triton: they register routes. A missing package is noted."""
    for module in (".composed", ".onednn"):
        importlib.import_module(module, __package__)
    UNAVAILABLE.clear()
    for kind in ("sycl", "triton"):
        if kind == "triton" and importlib.util.find_spec("triton") is None:
            UNAVAILABLE[kind] = "the package triton is not installed"
            continue
        if kind == "sycl" and (lack := importlib.import_module(".sycl.toolchain", __package__).missing()) is not None:
            UNAVAILABLE[kind] = lack
            continue
        package = importlib.import_module(f".{kind}", __package__)
        for found in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f".{kind}.{found.name}", __package__)
