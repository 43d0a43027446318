"""Quantized linear layers: one module for all formats, and siblings that share one packed weight.

A state dict of these modules holds canonical tensors under the names of the original linears (qweight, scales, zeros, perm, bias);
the packed weight is derived from them and is never saved.

perm, int32 [K], is there where columns were sorted by group (act-order): column k of the weight multiplies input feature perm[k],
so the product is x[..., perm] @ W.T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.check import check, check_dtype, check_shape
from ..ops.formats import Layout, check_canonical, dequantize, interleave_gate_up, split_gate_up

_quant_linear = ops.quant_linear.overload
_pack = ops.pack_weight
_unpack = ops.unpack_weight
_quantize = ops.quantize_weight


class Canonical(NamedTuple):
    """Device-independent tensors of one quantized weight [N, K], see ops/formats.py."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None


@dataclass(frozen=True)
class Scheme:
    """How a linear is quantized and computed.

    Args:
        layout: of the weight.
        compute: of the product.
        fullrange: see `ops.formats.quantize`.
    """

    layout: Layout
    compute: str
    fullrange: bool = False


class CanonicalLinear(nn.Module):
    """A linear as a checkpoint stores it: canonical tensors, not yet packed. `optimize` turns it into a `QuantLinear`.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        layout: of the tensors.
        dtype: of the bias.
        device: of the empty buffers made here.
        permuted: whether there is a perm.

    Attributes:
        added_bias: whether the model's class gives this linear no bias, so that a saved model must say that there is one.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        permuted: bool = False,
    ) -> None:
        """Make empty buffers of the right shapes."""
        super().__init__()
        self.in_features, self.out_features, self.layout = in_features, out_features, layout
        groups = layout.geometry(in_features).groups
        width = -(-in_features * layout.format.bits // 8)
        self.register_buffer("qweight", torch.empty((out_features, width), dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty((out_features, groups), dtype=layout.scale_dtype, device=device))
        zeros = torch.empty((out_features, groups), dtype=torch.uint8, device=device) if layout.asymmetric else None
        self.register_buffer("zeros", zeros)
        self.register_buffer("perm", torch.empty(in_features, dtype=torch.int32, device=device) if permuted else None)
        made = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), False) if bias else None
        self.register_parameter("bias", made)
        self.added_bias = False

    @property
    def weight(self) -> Tensor:
        """A meta tensor [N, K]: transformers may initialize a linear's weight while it loads, which then does nothing."""
        return torch.empty((self.out_features, self.in_features), device="meta")

    def canonical(self) -> Canonical:
        """Return the tensors.

        Raises:
            RuntimeError: shapes or dtypes are not the layout's, a scale is NaN or infinite, or perm is no permutation.
        """
        result = Canonical(self.qweight, self.scales, self.zeros)
        check_canonical(*result, self.layout, self.in_features)
        check_perm(self.perm, self.in_features)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """Raise: this is a weight on its way, not a layer to run."""
        raise RuntimeError("this linear holds an unpacked checkpoint; call llm.optimize on the model")


Source = nn.Linear | CanonicalLinear


def check_perm(perm: Tensor | None, in_features: int) -> None:
    """Raise RuntimeError unless perm is None or holds each of 0 .. K - 1 once."""
    if perm is None:
        return
    check_dtype(perm, torch.int32, "perm")
    check_shape(perm, (in_features,), "perm")
    check(torch.equal(perm.sort().values, torch.arange(in_features, dtype=torch.int32)), "perm is no permutation")


def perm_of(linear: nn.Module) -> Tensor | None:
    """Return a linear's perm, None where columns are in the order of the input features."""
    return linear.perm if isinstance(linear, CanonicalLinear) else None


def same_perm(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two linears take their input in the same order."""
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def common_perm(linears: Sequence[nn.Module]) -> Tensor | None:
    """Return the perm of linears that share one input.

    Raises:
        RuntimeError: they have different ones.
    """
    perms = [perm_of(linear) for linear in linears]
    check(
        all(same_perm(perms[0], p) for p in perms), "linears that take their input in different orders cannot be joined"
    )
    return perms[0]


def unpermuted(weight: Tensor, perm: Tensor | None) -> Tensor:
    """Return a weight [N, K] with its columns in the order of the input features."""
    return weight if perm is None else weight.index_select(1, perm.argsort())


def quantized(weight: Tensor, scheme: Scheme) -> Canonical:
    """Return [N, K] rounded to the scheme's format."""
    weight = weight.detach() if weight.dtype != torch.float64 else weight.detach().float()
    codes, scales, zeros = _quantize(weight, str(scheme.layout), scheme.fullrange)
    return Canonical(codes, scales, zeros if scheme.layout.asymmetric else None)


def canonical_of(linear: Source, scheme: Scheme) -> Canonical:
    """Return the canonical tensors of a linear: quantized now, or as loaded."""
    if isinstance(linear, CanonicalLinear):
        return linear.canonical()
    return quantized(linear.weight, scheme)


def concatenate(parts: Sequence[Canonical]) -> Canonical:
    """Stack weights along N."""
    zeros = None if parts[0].zeros is None else torch.cat([p.zeros for p in parts])  # type: ignore[misc]
    return Canonical(torch.cat([p.qweight for p in parts]), torch.cat([p.scales for p in parts]), zeros)


def narrow(part: Canonical, start: int, rows: int) -> Canonical:
    """Return rows start .. start + rows - 1, copied."""
    return Canonical(*(None if t is None else t[start : start + rows].clone() for t in part))  # type: ignore[arg-type]


def interleave(gate: Canonical, up: Canonical) -> Canonical:
    """Return the rows of gate and up 16 by 16 in turn."""
    return Canonical(*(None if g is None else interleave_gate_up(g, u) for g, u in zip(gate, up, strict=True)))  # type: ignore[arg-type]


def split_interleaved(both: Canonical, rows: int) -> tuple[Canonical, Canonical]:
    """Undo `interleave`; rows: of gate and of up."""
    pairs = [(None, None) if t is None else split_gate_up(t, rows) for t in both]
    return Canonical(*(p[0] for p in pairs)), Canonical(*(p[1] for p in pairs))  # type: ignore[arg-type]


def pack(part: Canonical, layout: Layout, in_features: int) -> Tensor:
    """Return the packed weight."""
    return _pack(part.qweight, part.scales, part.zeros, str(layout), in_features)


def unpack(packed: Tensor, layout: Layout, rows: int, in_features: int) -> Canonical:
    """Undo `pack`."""
    codes, scales, zeros = _unpack(packed, str(layout), rows, in_features)
    return Canonical(codes, scales, zeros if layout.asymmetric else None)


def write_state(
    destination: dict[str, Any], prefix: str, part: Canonical, bias: Tensor | None, perm: Tensor | None = None
) -> None:
    """Put a linear's tensors into a state dict under its name `prefix` (which ends with a dot)."""
    own = None if perm is None else perm.clone()  # siblings share one, which safetensors refuses
    for name, tensor in (*part._asdict().items(), ("perm", own), ("bias", bias)):
        if tensor is not None:
            destination[prefix + name] = tensor.detach()


def read_state(
    state: dict[str, Any], prefix: str, layout: Layout, rows: int, in_features: int, perm: Tensor | None
) -> Canonical:
    """Return a linear's tensors of a state dict; perm: what its own must be.

    Raises:
        RuntimeError: a tensor is missing or does not fit the layout, or the perm is another one.
    """
    names = ["qweight", "scales", *(["zeros"] if layout.asymmetric else [])]
    missing = [prefix + name for name in names if prefix + name not in state]
    if missing:
        raise RuntimeError(f"the state dict has no {', '.join(missing)}")
    zeros = state[prefix + "zeros"] if layout.asymmetric else None
    part = Canonical(state[prefix + "qweight"], state[prefix + "scales"], zeros)
    check_canonical(*part, layout, in_features)
    if part.qweight.shape[0] != rows:
        raise RuntimeError(f"{prefix}qweight has {part.qweight.shape[0]} rows; expected {rows}")
    if not same_perm(state.get(prefix + "perm"), perm):
        raise RuntimeError(f"{prefix}perm is not that of the model, which was built for one order of the columns")
    return part


class QuantLinear(nn.Module):
    """``epilogue(x @ W.T + bias)`` with a packed weight.

    Args:
        packed: uint8 [ceil(N / 32), tiles, tile_bytes] from `ops.pack_weight`.
        bias: [N] or None.
        layout: of the weight.
        in_features: K.
        out_features: N.
        compute: int8, bf16, fp16 or fp32.
        epilogue: none, relu, silu, gelu or gelu_tanh.
        perm: int32 [K] or None, see the module's docstring.
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
        out_features: int,
        compute: str = "int8",
        epilogue: str = "none",
        perm: Tensor | None = None,
    ) -> None:
        """Keep the packed weight as a buffer that is not saved."""
        super().__init__()
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("perm", perm, persistent=False)  # written by hand, under the name of every linear
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.layout = layout
        self.layout_text = str(layout)
        self.in_features, self.out_features = in_features, out_features
        self.compute, self.epilogue = compute, epilogue

    @classmethod
    def from_linear(cls, linear: Source, scheme: Scheme, epilogue: str = "none") -> QuantLinear:
        """Quantize (or take over) one linear."""
        packed = pack(canonical_of(linear, scheme), scheme.layout, linear.in_features)
        sizes = (linear.in_features, linear.out_features)
        return cls(packed, linear.bias, scheme.layout, *sizes, scheme.compute, epilogue, perm_of(linear))

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N] in the dtype of x [..., K]."""
        packed, bias = self._buffers["packed"], self._parameters["bias"]  # look-up by attribute takes 0.3 us each
        if (perm := self._buffers["perm"]) is not None:
            x = x.index_select(-1, perm)
        return _quant_linear(x, packed, bias, None, self.layout_text, self.out_features, self.compute, self.epilogue)

    def dequantized(self) -> Tensor:
        """Return the float32 weight [N, K] that this layer stands for."""
        return unpermuted(dequantize(*self.canonical(), self.layout, self.in_features), self.perm)

    def canonical(self) -> Canonical:
        """Return the canonical tensors."""
        return unpack(self.packed, self.layout, self.out_features, self.in_features)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        write_state(destination, prefix, self.canonical(), self.bias, self.perm)

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
            part = read_state(state_dict, prefix, self.layout, self.out_features, self.in_features, self.perm)
            self.packed.copy_(pack(part, self.layout, self.in_features))
            if self.bias is not None:
                self.bias.data.copy_(state_dict[prefix + "bias"])
        except (RuntimeError, KeyError) as error:
            errors.append(f"{prefix[:-1]}: {error}")

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.layout_text}, compute={self.compute}, epilogue={self.epilogue}"
            + (", permuted" if self.perm is not None else "")
        )


class _Pending:
    """Results of one call that siblings have not taken yet."""

    __slots__ = ("left", "outs", "version", "x")

    def __init__(self, x: Tensor, version: int, outs: list[Tensor | None], left: int) -> None:
        self.x, self.version, self.outs, self.left = x, version, outs, left


def _version(x: Tensor) -> int:
    """Return the mutation count; inference tensors and a graph being traced have none (no model changes x between siblings)."""
    return -1 if torch.compiler.is_compiling() or x.is_inference() else x._version


class LinearGroup(QuantLinear):
    """One packed weight for several linears with the same input.

    Args:
        sizes: out features of each.
        biased: which of them have a bias (a missing one is zero in the concatenated bias).
    """

    def __init__(
        self,
        packed: Tensor,
        bias: Tensor | None,
        layout: Layout,
        in_features: int,
        sizes: list[int],
        biased: list[bool],
        compute: str,
        perm: Tensor | None = None,
    ) -> None:
        """Keep the packed weight."""
        super().__init__(packed, bias, layout, in_features, sum(sizes), compute, perm=perm)
        self.sizes, self.biased = sizes, biased
        self._pending: list[_Pending | None] = [None]  # in a list: assigning an attribute of a module takes 2 us

    @classmethod
    def from_linears(cls, linears: Sequence[Source], scheme: Scheme) -> LinearGroup:
        """Quantize one after the other, then pack together."""
        whole = concatenate([canonical_of(linear, scheme) for linear in linears])
        packed = pack(whole, scheme.layout, linears[0].in_features)
        biased = [linear.bias is not None for linear in linears]
        bias = None
        if any(biased):
            bias = torch.cat(
                [
                    linear.bias.detach() if linear.bias is not None else packed.new_zeros(linear.out_features).float()
                    for linear in linears
                ]
            )
        sizes = [linear.out_features for linear in linears]
        first = linears[0]
        perm = common_perm(linears)
        return cls(packed, bias, scheme.layout, first.in_features, sizes, biased, scheme.compute, perm)

    def take(self, index: int, x: Tensor) -> Tensor:
        """Return output `index` for x: computed with all others when x is new, handed out when a sibling computed it.

        The very same tensor object is meant, unchanged since. Results that were handed out are released here.
        """
        pending = self._pending[0]
        if pending is not None and pending.x is x and pending.version == _version(x):
            out = pending.outs[index]
            if out is not None:
                pending.outs[index] = None
                pending.left -= 1
                if pending.left == 0:
                    self._pending[0] = None
                return out
        whole = self.forward(x)
        outs: list[Tensor | None] = list(whole.split_with_sizes(self.sizes, -1))
        out, outs[index] = outs[index], None
        self._pending[0] = _Pending(x, _version(x), outs, len(outs) - 1)
        assert out is not None
        return out

    def member_bias(self, index: int) -> Tensor | None:
        """Return the bias of one linear."""
        if self.bias is None or not self.biased[index]:
            return None
        return self.bias.split_with_sizes(self.sizes)[index].clone()

    def member_canonical(self, index: int) -> Canonical:
        """Return the canonical tensors of one linear."""
        return narrow(self.canonical(), sum(self.sizes[:index]), self.sizes[index])

    def set_member(self, index: int, part: Canonical, bias: Tensor | None) -> None:
        """Replace one linear."""
        whole = self.canonical()
        start = sum(self.sizes[:index])
        for old, new in zip(whole, part, strict=True):
            if old is not None and new is not None:
                old[start : start + self.sizes[index]] = new
        self.packed.copy_(pack(whole, self.layout, self.in_features))
        if self.bias is not None and bias is not None:
            self.bias.data[start : start + self.sizes[index]] = bias

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without results that nobody took."""
        return {**self.__dict__, "_pending": [None]}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        return  # the members write

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        return  # the members read


class SiblingLinear(nn.Module):
    """One linear of a `LinearGroup`, under its original name. The group is a submodule of the first sibling only."""

    group: LinearGroup

    def __init__(self, group: LinearGroup, index: int) -> None:
        """Refer to the group."""
        super().__init__()
        self.index = index
        self.in_features, self.out_features = group.in_features, group.sizes[index]
        if index == 0:  # parameters are counted and moved once
            self.add_module("group", group)
        self.__dict__["group"] = group

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N] in the dtype of x [..., K]."""
        return self.group.take(self.index, x)

    def dequantized(self) -> Tensor:
        """Return the float32 weight [N, K] that this layer stands for."""
        return self.group.dequantized().split_with_sizes(self.group.sizes)[self.index]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        group, index = self.group, self.index
        write_state(destination, prefix, group.member_canonical(index), group.member_bias(index), group.perm)

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
        group = self.group
        try:
            part = read_state(state_dict, prefix, group.layout, self.out_features, self.in_features, group.perm)
            bias = state_dict[prefix + "bias"] if group.biased[self.index] else None
            group.set_member(self.index, part, bias)
        except (RuntimeError, KeyError) as error:
            errors.append(f"{prefix[:-1]}: {error}")

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, shared weight, part {self.index}"
