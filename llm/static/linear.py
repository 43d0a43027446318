"""Static INT8 linears.

A state dict of these modules holds, under the names of the original linears, the canonical tensors of the weight (qweight, scales:
that of the multiplied columns), ``input_scale`` float32 [1], ``input_zero`` uint8 [1], ``factors`` float32 [K] (ones where a norm or
linear before multiplies) and bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
    unpack,
)
from ..mlp import QuantGatedMLP
from .summary import FACTORS, LayerSummary

_static_linear = ops.static_linear.overload
COMPUTE = "static"
_APART = "{} rounds its input otherwise than the linears that share its weight here"


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


def rounded(linear: Source, factors: Tensor, layout: Layout) -> CanonicalLinear:
    """Return a linear with its weight's columns divided by factors [K] and rounded; one that was loaded as it is."""
    if isinstance(linear, CanonicalLinear):
        return linear
    features = linear.in_features, linear.out_features
    new = CanonicalLinear(*features, linear.bias is not None, layout, linear.weight.dtype, "meta")
    new.qweight, new.scales, _ = quantized(linear.weight.detach().float() / factors, Scheme(layout, COMPUTE))
    new.bias = linear.bias
    return new


class _StaticInput(nn.Module):
    """What is common to modules with one packed weight whose input has static codes; all are `ops.static_linear`.

    Attributes:
        rows: of the packed weight.
    """

    packed: Tensor
    factors: Tensor | None
    sums: Tensor
    layout: Layout
    layout_text: str
    in_features: int
    rows: int
    epilogue: str

    def set_input(self, codes: InputCodes) -> None:
        """Take the input's codes over (new tensors: a captured graph notices) and what depends on the weight."""
        self.input_scale, self.input_zero = codes.scale, codes.zero
        ones = bool((codes.factors == 1).all())
        self.register_buffer("factors", None if ones else codes.factors.clone(), persistent=False)
        weight = unpack(self.packed, self.layout, self.rows, self.in_features)
        self.register_buffer("sums", ops.weight_sums(weight.qweight), persistent=False)

    def input_codes(self) -> InputCodes:
        """Return how the input is rounded."""
        factors = torch.ones(self.in_features) if self.factors is None else self.factors
        return InputCodes(self.input_scale, self.input_zero, factors)

    def product(self, x: Tensor, out_features: int) -> Tensor:
        """Return the layer's output [..., out_features] for x [..., K]."""
        held = self._buffers
        return _static_linear(
            x, held["packed"], held["sums"], self._parameters["bias"], None, held["factors"], self.input_scale,
            self.input_zero, self.layout_text, out_features, self.epilogue,
        )  # fmt: skip

    def smoothed(self, weight: Tensor) -> Tensor:
        """Return a weight [N, K] as it is for inputs that are not multiplied yet."""
        return weight if self.factors is None else weight * self.factors

    def write_input(self, destination: Any, prefix: str) -> None:
        """Put the input's codes into a state dict, under the name of one linear."""
        destination.update({prefix + name: t.clone() for name, t in self.input_codes().tensors().items()})

    def read_input(self, state: dict[str, Any], prefixes: Sequence[str], errors: list[str]) -> None:
        """Take the input's codes from a state dict that has them under the names of linears which share this weight."""
        try:
            found = [InputCodes.from_tensors(state, prefix, self.in_features) for prefix in prefixes]
            for prefix, codes in zip(prefixes, found, strict=True):
                if not codes.equals(found[0]):
                    raise RuntimeError(_APART.format(prefix[:-1]))
            self.set_input(found[0])
        except RuntimeError as error:
            errors.append(str(error))

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return f"{super().extra_repr()}, input_scale={self.input_scale:.4g}, input_zero={self.input_zero}"


class _StaticProduct(_StaticInput, QuantLinear):
    """What a `QuantLinear` does otherwise when its input has static codes."""

    @property
    def rows(self) -> int:  # type: ignore[override]
        """The packed weight's."""
        return self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N] in the dtype of x [..., K]."""
        return self.product(x, self.out_features)

    def dequantized(self) -> Tensor:
        """Return the float32 weight [N, K] that this layer stands for."""
        return self.smoothed(super().dequantized())


class StaticLinear(_StaticProduct):
    """``epilogue(x @ W.T + bias)`` in 8 bits with static scales; see `ops.static_linear`."""

    @classmethod
    def make(cls, linear: CanonicalLinear, codes: InputCodes, layout: Layout, epilogue: str = "none") -> StaticLinear:
        """Take over one linear."""
        packed = pack(linear.canonical(), layout, linear.in_features)
        new = cls(packed, linear.bias, layout, linear.in_features, linear.out_features, COMPUTE, epilogue)
        new.set_input(codes)
        return new

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.write_input(destination, prefix)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.read_input(state_dict, [prefix], args[-1])


class StaticGroup(_StaticProduct, LinearGroup):
    """One packed weight for several linears with the same input."""

    @classmethod
    def make(cls, linears: Sequence[CanonicalLinear], codes: InputCodes, layout: Layout) -> StaticGroup:
        """Pack linears together."""
        first, biased = linears[0], [linear.bias is not None for linear in linears]
        packed = pack(concatenate([linear.canonical() for linear in linears]), layout, first.in_features)
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
        self.group.write_input(destination, prefix)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        try:
            codes = InputCodes.from_tensors(state_dict, prefix, self.in_features)
            if self.index == 0:
                self.group.set_input(codes)
            elif not codes.equals(self.group.input_codes()):
                raise RuntimeError(_APART.format(prefix[:-1]))
        except RuntimeError as error:
            args[-1].append(str(error))


class StaticGatedMLP(_StaticInput, QuantGatedMLP):
    """A `QuantGatedMLP` whose gate and up round their input by static codes."""

    @property
    def rows(self) -> int:  # type: ignore[override]
        """The packed weight's: gate and up in whole blocks."""
        return 2 * (-(-self.width // 16) * 16)

    @classmethod
    def make(
        cls, linears: dict[str, CanonicalLinear], activation: str, codes: InputCodes, layout: Layout, down: nn.Module
    ) -> StaticGatedMLP:
        """Pack gate and up together; the arguments are those of `QuantGatedMLP.from_linears`."""
        new = cls.from_linears({**linears}, activation, Scheme(layout, COMPUTE), down)
        assert isinstance(new, StaticGatedMLP)
        new.set_input(codes)
        return new

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., K] for x [..., K]."""
        return self._modules[self.names[-1]](self.product(x, self.width))  # type: ignore[misc]

    def dequantized(self) -> dict[str, Tensor]:
        """Return the float32 weights by the original linears' names, without the last one."""
        return {name: self.smoothed(weight) for name, weight in super().dequantized().items()}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.names[:-1]:
            self.write_input(destination, f"{prefix}{name}.")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.read_input(state_dict, [f"{prefix}{name}." for name in self.names[:-1]], args[-1])
