"""Which bundles a model needs, and compiling them ahead of their first use."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from ...ops.formats import FORMATS
from . import attention, linear
from .bundle import Bundle, prepare, queue_of
from .pointwise import pointwise

#: Two at a time: a compilation takes a core, and the host part of a model's start takes others.
WORKERS = 2


def programs(
    element: torch.dtype,
    weight_dtypes: Sequence[str] = ("int4",),
    compute: str = "int8",
    head_dim: int = 128,
    cache: torch.dtype | None = None,
) -> tuple[Bundle, ...]:
    """Return the bundles of a decoder: norms and rotations, its linears, attention of one token and of many.

    Args:
        element: dtype of the activations.
        weight_dtypes: formats of the weights, names in `llmrt.ops.FORMATS`.
        compute: of the products; formats without it take bf16.
        head_dim: elements of a head.
        cache: dtype of the key/value cache; None: that of the activations.

    Raises:
        ValueError: a format is unknown.
    """
    unknown = [name for name in weight_dtypes if name not in FORMATS]
    if unknown:
        raise ValueError(f"weight dtype is {unknown[0]!r}; valid: {', '.join(FORMATS)}")
    stored = cache or element
    linears = dict.fromkeys(
        linear.bundle(row, compute == "int8" and "int8" in row.computes)
        for row in (FORMATS[name] for name in weight_dtypes)
    )
    if attention.has_program(element, stored, head_dim):
        rows = sorted({attention.rows_of_program(n, stored) for n in attention.ROWS})
        heads = tuple(attention.bundle(element, n, stored, head_dim) for n in rows)
    else:
        heads = (attention.bundle(element, attention.ANY_ROWS),)
    return (pointwise(element), *linears, *heads)


def compile_ahead(device: torch.device, bundles: Sequence[Bundle]) -> Iterator[tuple[Bundle, float]]:
    """Compile bundles for a device, two at a time, into this process and SYCL's cache; yield each with its seconds.

    Args:
        device: to compile for.
        bundles: from `programs`.

    Raises:
        RuntimeError: a bundle does not compile; with the compiler's messages.
    """
    queue_of(device)  # one launcher and one queue for both threads

    def one(bundle: Bundle) -> tuple[Bundle, float]:
        start = time.perf_counter()
        prepare(device, bundle)
        return bundle, time.perf_counter() - start

    with ThreadPoolExecutor(WORKERS) as pool:
        yield from pool.map(one, bundles)
