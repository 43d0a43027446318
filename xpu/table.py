"""The table of routes: which kind of kernel serves which operator, dtype and shape, in order of preference."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import onednn
from .route import KINDS, ROUTES, UNAVAILABLE, Route

#: Up to this many rows a product is bound by reading the weight, which the SYCL kernels do once for several of them.
SMALL_M = 16


@dataclass(frozen=True)
class Row:
    """One row: calls of an operator that satisfy `serves` take a kind of route.

    Args:
        operator: name in `llmrt.ops`.
        kind: "sycl", "triton" or "torch".
        when: `serves` in words.
        serves: takes the operator's arguments; whether this row applies.
    """

    operator: str
    kind: str
    when: str = "always"
    serves: Callable[..., bool] = lambda *args, **kwargs: True


def _few_rows(x: Any, *args: Any, **kwargs: Any) -> bool:
    return x.numel() <= SMALL_M * x.shape[-1]


def _onednn_is_asked_for(x: Any, weight: Any, bias: Any, other: Any, layout: str, *args: Any, **kwargs: Any) -> bool:
    return layout.startswith("int4_") and not _few_rows(x) and onednn.asked()


def _one_token(query: Any, *args: Any, **kwargs: Any) -> bool:
    return query.shape[1] == 1


TABLE = (
    Row("quant_linear", "sycl", f"at most {SMALL_M} rows", _few_rows),
    Row("quant_linear", "torch", f"int4, more than {SMALL_M} rows, {onednn.ASKED_BY}=1", _onednn_is_asked_for),
    Row("quant_linear", "triton"),
    Row("quant_linear", "sycl"),
    Row("attention", "sycl", "one query token", _one_token),
    Row("attention", "triton"),
    Row("attention", "sycl"),
    *(Row(operator, kind) for operator in ("quant_experts", "static_linear") for kind in ("triton", "torch")),
    Row("pack_weight", "sycl"),
    Row("pack_weight", "torch"),
    *(
        Row(operator, kind)
        for operator in (
            *("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"),
            *("rope", "rope_append", "kv_append", "silu_mul", "gelu_mul", "argmax"),
        )
        for kind in ("sycl", "triton")
    ),
    *(
        Row(operator, "torch")
        for operator in ("dense_linear", "parallel_linear", "gated_linear", "unpack_weight", "quantize_weight")
    ),
)


def forced_kind() -> str | None:
    """Return the kind that the environment variable LLMRT_XPU_KERNELS forces, "reference" included, or None.

    Raises:
        ValueError: it has another value.
    """
    value = os.environ.get("LLMRT_XPU_KERNELS", "").strip().lower()
    valid = (*KINDS, "reference")
    if value and value not in valid:
        raise ValueError(f"LLMRT_XPU_KERNELS is {value!r}; valid: {', '.join(valid)}")
    return value or None


def candidates(operator: str, kinds: tuple[str, ...], forced: str | None) -> Iterator[tuple[Row, Route]]:
    """Yield the rows of an operator that have a route, in order.

    Args:
        operator: name in `llmrt.ops`.
        kinds: what the device can run.
        forced: only this kind, for every shape (operators that lack it keep torch's route); None: as the table says.
    """
    if forced in ("sycl", "triton") and forced not in {row.kind for row in TABLE if row.operator == operator}:
        forced = "torch"
    seen = set()
    for row in TABLE:
        found = ROUTES.get((operator, row.kind))
        if row.operator != operator or row.kind not in kinds or found is None:
            continue
        if forced is None:
            yield row, found
        elif row.kind == forced and forced not in seen:
            seen.add(forced)
            yield Row(operator, forced), found


def choose(rows: tuple[tuple[Row, Route], ...], *args: Any, **kwargs: Any) -> tuple[Route | None, str]:
    """Return the first route that serves a call, or None and why there is none.

    Args:
        rows: from `candidates`.
        args: the operator's arguments.
        kwargs: the same.
    """
    reasons = []
    for row, route in rows:
        if row.serves(*args, **kwargs):
            reason = route.refuses(*args, **kwargs)
            if reason is None:
                return route, ""
            reasons.append(f"{route.kind}: {reason}")
    reasons += [f"{kind}: {reason}" for kind, reason in UNAVAILABLE.items()]
    return None, "; ".join(dict.fromkeys(reasons)) or "it has no kernel for this device"
