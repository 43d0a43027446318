"""Gated activations: an activation of one tensor times another."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from ..route import route
from . import blocks
from .activations import activate
from .launch import launch, refuses_double

# mypy: disable-error-code="no-untyped-def"


@triton.jit
def _gated(gate, up, y, rows, columns, gate_row, gate_column, up_row, up_column, NAME: tl.constexpr,
           ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """gate, up: [rows, columns] with strides; y: contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (k < columns)
    a = tl.load(gate + row * gate_row + k * gate_column, inside, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_row + k * up_column, inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + k, (activate(a, NAME) * b).to(y.dtype.element_ty), inside)


def _run(y: Tensor, gate: Tensor, up: Tensor, name: str) -> Tensor:
    if y.numel():
        rows, columns = y.numel() // y.shape[-1], y.shape[-1]
        left, right = gate.reshape(rows, columns), up.reshape(rows, columns)
        launch(
            _gated,
            blocks.elements(columns),
            lambda b: (triton.cdiv(rows, b.sizes["ROWS"]), triton.cdiv(columns, b.sizes["BLOCK"])),
            (rows, columns, y.dtype),
            *(left, right, y, rows, columns, *left.stride(), *right.stride()),
            NAME=name,
        )
    return y


def _refuses(gate: Tensor, up: Tensor, *args: Any, **kwargs: Any) -> str | None:
    return refuses_double(gate)


@route("triton", "silu_mul", _refuses)
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See `llmrt.ops.silu_mul`."""
    return _run(ops.silu_mul.empty(gate, up), gate, up, "silu")


@route("triton", "gelu_mul", _refuses)
def gelu_mul(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """See `llmrt.ops.gelu_mul`."""
    y = ops.gelu_mul.empty(gate, up, approximate)
    return _run(y, gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")
