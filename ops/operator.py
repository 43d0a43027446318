"""Turns one typed torch function into a ``torch.library`` operator: schema, fake kernel, fallback and oracle at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library("llmrt", "DEF")

#: Every operator by name; tests, benchmarks and other devices iterate it.
OPERATORS: dict[str, Operator[..., Any]] = {}


@dataclass
class Sample:
    """One call of an operator: arguments, and what the call is about.

    Args:
        name: shown in test ids.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
        """Return the sample with `function` applied to every tensor, those in lists included."""

        def one(value: Any) -> Any:
            if isinstance(value, list):
                return [one(v) for v in value]
            return function(value) if isinstance(value, torch.Tensor) else value

        return Sample(self.name, tuple(one(a) for a in self.args), {k: one(v) for k, v in self.kwargs.items()})

    def double(self) -> Sample:
        """Return the sample with floating tensors in float64: the reference then is the oracle."""
        return self.map(lambda t: t.double() if t.is_floating_point() else t)

    def clone(self) -> Sample:
        """Return the sample with its tensors copied, strides included: operators that mutate get a fresh one."""

        def copy(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage().clone()  # torch.clone would make a view with gaps contiguous
            return torch.empty(0, dtype=t.dtype).set_(storage, t.storage_offset(), t.shape, t.stride())

        return self.map(copy)


class Operator(Generic[P, R]):
    """A registered operator: call it, or its `reference` (plain torch, any device and dtype, float64 included)."""

    def __init__(self, reference: Callable[P, R], mutates: tuple[str, ...], exact: bool) -> None:
        """Define ``llmrt::<name of the function>`` from its signature."""
        self.name = reference.__name__
        self.reference = reference
        self.mutates = mutates
        self.exact = exact
        self.__doc__ = reference.__doc__
        self._samples: Callable[[torch.dtype], Iterator[Sample]] | None = None
        schema = torch.library.infer_schema(reference, mutates_args=mutates)
        _library.define(self.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"llmrt::{self.name}", reference, lib=_library)
        #: Checks the arguments and returns outputs of the right shapes, not computed: what a kernel in Python starts with.
        self.empty: Callable[P, R] = reference
        self.overload = getattr(torch.ops.llmrt, self.name).default
        OPERATORS[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the fastest implementation that the tensors' device has."""
        return self.overload(*args, **kwargs)

    def fake(self, function: Callable[P, R]) -> Callable[P, R]:
        """Replace the fake kernel (by default the reference) where shapes are cheaper to say than to compute."""
        torch.library.register_fake(f"llmrt::{self.name}", function, lib=_library, allow_override=True)
        self.empty = function
        return function

    def samples(self, function: Callable[[torch.dtype], Iterator[Sample]]) -> Callable[[torch.dtype], Iterator[Sample]]:
        """Register the generator of sample inputs; it takes the activation dtype."""
        self._samples = function
        return function

    def sample_inputs(self, dtype: torch.dtype) -> list[Sample]:
        """Return sample inputs of one activation dtype, odd shapes included, the same at every call."""
        if self._samples is None:
            raise ValueError(f"operator {self.name} has no samples")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return list(self._samples(dtype))


def operator(*, mutates: tuple[str, ...] = (), exact: bool = False) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Return a decorator that registers a typed function as an operator.

    Args:
        mutates: names of the arguments that the operator writes to.
        exact: every implementation gives the reference's very bits: the operator moves bits, or each of its roundings is prescribed.
    """
    return lambda reference: Operator(reference, mutates, exact)
