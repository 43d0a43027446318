"""Static INT8 linears.

A state dict of these modules holds, under the names of the original linears, the canonical tensors of the weight (qweight, scales:
that of the multiplied columns), ``input_scale`` float32 [1], ``input_zero`` uint8 [1], ``factors`` float32 [K] and bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...ops.formats import Layout
from ..linear import (
    Canonical,
    CanonicalLinear,
    LinearGroup,
    QuantLinear,
    Scheme,
    SiblingLinear,
    Source,
    concatenate,
    pack,
    quantized,
)
from .summary import FACTORS, LayerSummary

_static_linear = ops.static_linear.overload
COMPUTE = "static"


class InputCodes(NamedTuple):
    """How a linear's input is rounded.

    Args:
        scale: of the multiplied activations.
        zero: their zero point, 0 to 255.
        factors: float32 [K]: what the channels are multiplied by.
    """

    scale: float
    zero: int
    factors: Tensor

    @classmethod
    def of(cls, summary: LayerSummary) -> InputCodes:
        """Return those of a calibrated layer."""
        return cls(summary.input_scale, summary.input_zero, summary.factors)

    def equals(self, other: InputCodes) -> bool:
        """Return whether both round in the same way."""
        return self[:2] == other[:2] and torch.equal(self.factors, other.factors)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds."""
        return {
            "input_scale": torch.tensor([self.scale], dtype=torch.float32),
            "input_zero": torch.tensor([self.zero], dtype=torch.uint8),
            "factors": self.factors,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Any], prefix: str, in_features: int) -> InputCodes:
        """Return those of a checkpoint.

        Raises:
            RuntimeError: a tensor is missing, has another shape or dtype, or a value that cannot be.
        """
        wanted = {
            "input_scale": ((1,), torch.float32), "input_zero": ((1,), torch.uint8), "factors": ((in_features,), torch.float32)
        }  # fmt: skip
        for name, (shape, dtype) in wanted.items():
            t = tensors.get(prefix + name)
            if t is None:
                raise RuntimeError(f"there is no {prefix}{name}")
            if t.shape != shape or t.dtype != dtype:
                raise RuntimeError(
                    f"{prefix}{name} is {str(t.dtype)[6:]} {list(t.shape)}; expected {str(dtype)[6:]} {list(shape)}"
                )
        scale, factors = float(tensors[prefix + "input_scale"]), tensors[prefix + "factors"]
        if not 1e-30 <= scale <= 1e30:
            raise RuntimeError(f"{prefix}input_scale is {scale}; valid: 1e-30 to 1e30")
        if not bool(((factors >= FACTORS[0]) & (factors <= FACTORS[1])).all()):
            raise RuntimeError(f"{prefix}factors has values outside of {FACTORS[0]:g} to {FACTORS[1]:g}")
        return cls(scale, int(tensors[prefix + "input_zero"]), factors)


class StoredStaticLinear(CanonicalLinear):
    """A static linear as a checkpoint stores it. `optimize` turns it into a `StaticLinear`."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, layout: Layout, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        """Make empty buffers of the right shapes."""
        super().__init__(in_features, out_features, bias, layout, dtype, device)
        self.register_buffer("input_scale", torch.empty(1, dtype=torch.float32, device=device))
        self.register_buffer("input_zero", torch.empty(1, dtype=torch.uint8, device=device))
        self.register_buffer("factors", torch.empty(in_features, dtype=torch.float32, device=device))

    def canonical(self) -> Canonical:
        """Return the weight's tensors; what the input has is checked too."""
        self.input_codes()
        return super().canonical()

    def input_codes(self) -> InputCodes:
        """Return how the input is rounded.

        Raises:
            RuntimeError: a tensor has another shape or dtype, or a value that cannot be.
        """
        return InputCodes.from_tensors(self._buffers, "", self.in_features)


def _canonical(linear: Source, codes: InputCodes, layout: Layout) -> Canonical:
    """Return the weight with its columns divided by the factors, rounded, or as loaded."""
    if isinstance(linear, CanonicalLinear):
        return linear.canonical()
    return quantized(linear.weight.detach().float() / codes.factors, Scheme(layout, COMPUTE))


class _StaticProduct(QuantLinear):
    """What a `QuantLinear` does otherwise when its input has static codes."""

    factors: Tensor
    sums: Tensor

    def set_input(self, codes: InputCodes) -> None:
        """Take the input's codes over (new tensors: a captured graph notices) and what depends on the weight."""
        self.input_scale, self.input_zero = codes.scale, codes.zero
        self.register_buffer("factors", codes.factors.clone(), persistent=False)
        self.register_buffer("sums", ops.weight_sums(self.canonical().qweight), persistent=False)

    def input_codes(self) -> InputCodes:
        """Return how the input is rounded."""
        return InputCodes(self.input_scale, self.input_zero, self.factors)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N] in the dtype of x [..., K]."""
        held = self._buffers
        return _static_linear(
            x, held["packed"], held["sums"], self._parameters["bias"], None, held["factors"], self.input_scale,
            self.input_zero, self.layout_text, self.out_features, self.epilogue,
        )  # fmt: skip

    def dequantized(self) -> Tensor:
        """Return the float32 weight [N, K] that this layer stands for."""
        return super().dequantized() * self.factors

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return f"{super().extra_repr()}, input_scale={self.input_scale:.4g}, input_zero={self.input_zero}"


class StaticLinear(_StaticProduct):
    """``x @ W.T + bias`` in 8 bits with static scales; see `ops.static_linear`."""

    @classmethod
    def make(cls, linear: Source, codes: InputCodes, layout: Layout) -> StaticLinear:
        """Round (or take over) one linear."""
        packed = pack(_canonical(linear, codes, layout), layout, linear.in_features)
        new = cls(packed, linear.bias, layout, linear.in_features, linear.out_features, COMPUTE)
        new.set_input(codes)
        return new

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: t for name, t in self.input_codes().tensors().items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        try:
            self.set_input(InputCodes.from_tensors(state_dict, prefix, self.in_features))
        except RuntimeError as error:
            args[-1].append(str(error))


class StaticGroup(_StaticProduct, LinearGroup):
    """One packed weight for several linears with the same input."""

    @classmethod
    def make(cls, linears: Sequence[Source], codes: InputCodes, layout: Layout) -> StaticGroup:
        """Round (or take over) one after the other, then pack together."""
        first, biased = linears[0], [linear.bias is not None for linear in linears]
        packed = pack(concatenate([_canonical(linear, codes, layout) for linear in linears]), layout, first.in_features)
        parts = [torch.zeros(m.out_features) if m.bias is None else m.bias.detach() for m in linears]
        bias = torch.cat(parts) if any(biased) else None
        new = cls(packed, bias, layout, first.in_features, [m.out_features for m in linears], biased, COMPUTE)
        new.set_input(codes)
        return new

    def set_member(self, index: int, part: Canonical, bias: Tensor | None) -> None:
        """Replace one linear."""
        super().set_member(index, part, bias)
        self.set_input(self.input_codes())


class StaticSibling(SiblingLinear):
    """One linear of a `StaticGroup`, under its original name."""

    group: StaticGroup

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: t.clone() for name, t in self.group.input_codes().tensors().items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        try:
            codes = InputCodes.from_tensors(state_dict, prefix, self.in_features)
            if self.index == 0:
                self.group.set_input(codes)
            elif not codes.equals(self.group.input_codes()):
                raise RuntimeError(
                    f"{prefix[:-1]} rounds its input otherwise than the linears that share its weight here"
                )
        except RuntimeError as error:
            args[-1].append(str(error))
