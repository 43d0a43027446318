"""Gated feed-forward modules in one or two operator calls less than the original."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.formats import Layout, split_gate_up
from .linear import (
    Canonical,
    Scheme,
    Source,
    canonical_of,
    common_perm,
    concatenate,
    interleave,
    narrow,
    pack,
    read_state,
    split_interleaved,
    unpack,
    unpermuted,
    write_state,
)

_quant_linear = ops.quant_linear.overload
_silu_mul = ops.silu_mul.overload
_gelu_mul = ops.gelu_mul.overload

#: activation -> act(gate) * up
_PRODUCTS = {
    "silu": _silu_mul,
    "gelu": partial(_gelu_mul, approximate="none"),
    "gelu_tanh": partial(_gelu_mul, approximate="tanh"),
}
#: Activations that have a gated form.
GATED_ACTIVATIONS = tuple(_PRODUCTS)


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))`` over floating-point linears, which stay submodules under their own names.

    Args:
        linears: name -> linear; (gate, up, down), or (gate_up, down) where the first half of gate_up's rows is the gate.
        activation: silu, gelu or gelu_tanh.
    """

    def __init__(self, linears: dict[str, nn.Module], activation: str) -> None:
        """Take the linears over."""
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)
        self.names = tuple(linears)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., K] for x [..., K]."""
        modules, names = self._modules, self.names
        if len(names) == 3:
            gate, up = modules[names[0]](x), modules[names[1]](x)  # type: ignore[misc]
        else:
            gate, up = modules[names[0]](x).chunk(2, -1)  # type: ignore[misc]
        return modules[names[-1]](_PRODUCTS[self.activation](gate, up))  # type: ignore[misc]

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return f"activation={self.activation}"


class QuantGatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))`` with gate and up in one packed weight, 16 rows of each in turn.

    Args:
        packed: of the interleaved gate and up.
        bias: interleaved, or None.
        layout: of packed.
        in_features: K.
        width: I, the out features of gate and of up.
        compute: of gate and up.
        activation: silu, gelu or gelu_tanh.
        names: of the original linears: (gate, up, down) or (gate_up, down).
        down: the last linear, registered under its name.
        perm: of gate and up, int32 [K] or None; see llm/linear.py.
    """

    packed: Tensor
    perm: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        packed: Tensor,
        bias: Tensor | None,
        layout: Layout,
        in_features: int,
        width: int,
        compute: str,
        activation: str,
        names: tuple[str, ...],
        down: nn.Module,
        perm: Tensor | None = None,
    ) -> None:
        """Keep the packed weight as a buffer that is not saved."""
        super().__init__()
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("perm", perm, persistent=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.layout, self.layout_text = layout, str(layout)
        self.in_features, self.width, self.compute = in_features, width, compute
        self.names, self.activation, self.epilogue = names, activation, f"{activation}_mul"
        self.add_module(names[-1], down)

    @classmethod
    def from_linears(
        cls, linears: dict[str, Source], activation: str, scheme: Scheme, down: nn.Module
    ) -> QuantGatedMLP:
        """Quantize gate and up (one linear or two) one after the other and pack them together.

        Args:
            linears: name -> linear, as in `GatedMLP`; the last one is read for its name only.
            activation: silu, gelu or gelu_tanh.
            scheme: of gate and up.
            down: the converted last linear.
        """
        names = tuple(linears)
        first = linears[names[0]]
        if len(names) == 3:
            width = first.out_features
            gate, up = (canonical_of(linears[name], scheme) for name in names[:2])
            biases = [linears[name].bias for name in names[:2]]
        else:
            width = first.out_features // 2
            both = canonical_of(first, scheme)
            gate, up = narrow(both, 0, width), narrow(both, width, width)
            biases = [None, None] if first.bias is None else list(first.bias.detach().split(width))
        bias = None
        if any(b is not None for b in biases):
            bias = ops.interleave_gate_up(
                *(b.detach() if b is not None else torch.zeros(width, dtype=torch.float32) for b in biases)
            )
        packed = pack(interleave(gate, up), scheme.layout, first.in_features)
        sizes = (first.in_features, width)
        perm = common_perm([linears[name] for name in names[:-1]])
        return cls(packed, bias, scheme.layout, *sizes, scheme.compute, activation, names, down, perm)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., K] for x [..., K]."""
        packed, bias = self._buffers["packed"], self._parameters["bias"]  # look-up by attribute takes 0.3 us each
        if (perm := self._buffers["perm"]) is not None:
            x = x.index_select(-1, perm)
        h = _quant_linear(x, packed, bias, None, self.layout_text, self.width, self.compute, self.epilogue)
        return self._modules[self.names[-1]](h)  # type: ignore[misc]

    def canonical(self) -> dict[str, Canonical]:
        """Return the canonical tensors by the original linears' names."""
        rows = 2 * (-(-self.width // 16) * 16)
        gate, up = split_interleaved(unpack(self.packed, self.layout, rows, self.in_features), self.width)
        parts = (gate, up) if len(self.names) == 3 else (concatenate((gate, up)),)
        return dict(zip(self.names[:-1], parts, strict=True))

    def dequantized(self) -> dict[str, Tensor]:
        """Return the float32 weights by the original linears' names, without the last one."""
        return {
            name: unpermuted(ops.dequantize(*part, self.layout, self.in_features), self.perm)
            for name, part in self.canonical().items()
        }

    def biases(self) -> list[Tensor | None]:
        """Return the biases of the original linears, without the last one."""
        if self.bias is None:
            return [None] * (len(self.names) - 1)
        gate, up = split_gate_up(self.bias.detach(), self.width)
        return [gate, up] if len(self.names) == 3 else [torch.cat((gate, up))]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for (name, part), bias in zip(self.canonical().items(), self.biases(), strict=True):
            write_state(destination, f"{prefix}{name}.", part, bias, self.perm)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        try:
            width = self.width if len(self.names) == 3 else 2 * self.width
            parts, biases = [], []
            for name in self.names[:-1]:
                key = f"{prefix}{name}."
                parts.append(read_state(state_dict, key, self.layout, width, self.in_features, self.perm))
                if self.bias is not None:
                    biases.append(state_dict[f"{prefix}{name}.bias"])
            if len(parts) == 1:
                parts = [narrow(parts[0], i * self.width, self.width) for i in (0, 1)]
                biases = [half for b in biases for half in b.split(self.width)]
            self.packed.copy_(pack(interleave(*parts), self.layout, self.in_features))
            if self.bias is not None:
                self.bias.data.copy_(ops.interleave_gate_up(*biases))
        except (RuntimeError, KeyError) as error:
            errors.append(f"{prefix[:-1]}: {error}")

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return (
            f"in_features={self.in_features}, width={self.width}, {self.layout_text}, compute={self.compute}, "
            f"epilogue={self.epilogue}"
        )
