"""Experts of mixture-of-experts layers: one module with one tensor for all of them, as transformers has it, over packed weights.

transformers keeps gate and up of all experts as ``gate_up_proj`` [E, 2 I, H] and the last linears as ``down_proj`` [E, H, I]. Here, and
in quantized checkpoints, expert e is three linears under the names ``e.gate_proj``, ``e.up_proj`` and ``e.down_proj``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.formats import Layout, dequantize
from . import huge_pages
from .linear import (
    Canonical,
    CanonicalLinear,
    Scheme,
    canonical_of,
    common_perm,
    interleave,
    narrow,
    pack,
    perm_of,
    quantized,
    read_state,
    split_interleaved,
    unpack,
    unpermuted,
    write_state,
)

_quant_experts = ops.quant_experts.overload

#: The linears of one expert.
PARTS = ("gate_proj", "up_proj", "down_proj")
_JOINED = ("gate_up_proj", "down_proj")
#: Attributes of transformers' modules -> (the value that other code than ours computes, what it means).
_FORMS = {
    "is_transposed": (True, "its weights are stored transposed"),
    "has_bias": (True, "its linears have biases"),
    "is_concatenated": (False, "rows of gate and up are stored in turn"),
    "has_gate": (False, "it has no gate"),
    "has_post_expert_norm": (True, "a norm follows each expert"),
}


class ExpertSizes(NamedTuple):
    """Numbers of experts (E), of their inputs and outputs (H) and of the features between their linears (I)."""

    experts: int
    hidden: int
    width: int


def is_experts(module: nn.Module) -> bool:
    """Return whether a module holds the weights of several experts, in floating point."""
    held = [module._parameters.get(name) for name in _JOINED]
    return all(p is not None and p.dim() == 3 for p in held)


def experts_misfit(module: nn.Module) -> str | None:
    """Return why experts (`is_experts`) have another form than `QuantExperts`, or None; what they compute is to be probed."""
    for name, (other, meaning) in _FORMS.items():
        if getattr(module, name, not other) == other:
            return f"{type(module).__name__}: {meaning}"
    others = sorted({n for n, p in module._parameters.items() if p is not None} - set(_JOINED))
    if others:
        return f"{type(module).__name__} has {', '.join(others)} beside the weights of its experts"
    (e, rows, h), down = (tuple(p.shape) for p in _joined(module))
    if rows % 2 or down != (e, h, rows // 2):
        return f"{type(module).__name__} has weights of shapes {[e, rows, h]} and {list(down)}"
    return None


def _joined(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    gate_up, down = (module._parameters[name] for name in _JOINED)
    assert gate_up is not None and down is not None
    return gate_up, down


def sizes_of(module: nn.Module) -> ExpertSizes:
    """Return the sizes of experts in floating point."""
    gate_up, down = _joined(module)
    return ExpertSizes(gate_up.shape[0], gate_up.shape[2], down.shape[2])


def part_names(count: int) -> Iterator[tuple[str, str, str]]:
    """Yield the names of each expert's linears."""
    for expert in range(count):
        yield tuple(f"{expert}.{part}" for part in PARTS)  # type: ignore[misc]


class _Blank(nn.Linear):
    """A linear on the meta device; thousands are made, and to initialize one takes a millisecond."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class StoredExperts(nn.Module):
    """Experts one by one, as a checkpoint stores them: children ``e.gate_proj`` and so on. `optimize` makes `QuantExperts` of it.

    Args:
        module: the experts that it replaces; its shapes and dtype are taken over, its weights are not.
        activation: silu, gelu or gelu_tanh.
    """

    def __init__(self, module: nn.Module, activation: str) -> None:
        """Make linears on the meta device, to be replaced."""
        super().__init__()
        self.sizes, self.activation = sizes_of(module), activation
        count, hidden, width = self.sizes
        dtype = _joined(module)[0].dtype
        for expert in range(count):
            child = nn.Module()
            for part, (n, k) in zip(PARTS, ((width, hidden), (width, hidden), (hidden, width)), strict=True):
                linear = _Blank(k, n, False, "meta", dtype)
                linear.weight.requires_grad_(False)
                child.add_module(part, linear)
            self.add_module(str(expert), child)
        self.train(module.training)

    def linears(self) -> Iterator[tuple[nn.Module, nn.Module, nn.Module]]:
        """Yield (gate, up, down) of each expert."""
        for names in part_names(self.sizes.experts):
            yield tuple(self.get_submodule(name) for name in names)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raise: these are weights on their way, not a layer to run."""
        raise RuntimeError("these experts hold an unpacked checkpoint; call llm.optimize on the model")

    def layouts(self) -> tuple[Layout, Layout]:
        """Return the layouts of gate and up, and of down; asymmetric where some are and others happen to be symmetric.

        Raises:
            RuntimeError: they differ between experts, or a gate takes its inputs in another order than its up.
        """
        ups, downs = set[Layout](), set[Layout]()
        for expert, linears in enumerate(self.linears()):
            for part, linear in zip(PARTS, linears, strict=True):
                if not isinstance(linear, CanonicalLinear):
                    raise RuntimeError(f"{expert}.{part} is floating point and other linears of the experts are not")
                if linear.bias is not None:
                    raise RuntimeError(f"{expert}.{part} has a bias, which experts cannot have")
                (downs if part == PARTS[-1] else ups).add(linear.layout)
            common_perm(linears[:2])
        return _widest(ups), _widest(downs)


class QuantExperts(nn.Module):
    """The chosen experts' ``down(act(gate(x)) * up(x))``, weighted by the router, with packed weights.

    Args:
        gate_up: uint8 [E, ...], see `ops.quant_experts`.
        down: uint8 [E, ...].
        perms: int32 [E, H] and [E, I] or None, see `ops.quant_experts`.
        sizes: of the experts.
        schemes: of gate and up, and of down.
        activation: silu, gelu or gelu_tanh.
    """

    gate_up: Tensor
    down: Tensor
    perm: Tensor | None
    down_perm: Tensor | None

    def __init__(
        self,
        gate_up: Tensor,
        down: Tensor,
        perms: tuple[Tensor | None, Tensor | None],
        sizes: ExpertSizes,
        schemes: Sequence[Scheme],
        activation: str,
    ) -> None:
        """Keep the packed weights as buffers that are not saved."""
        super().__init__()
        for name, tensor in (("gate_up", gate_up), ("down", down), ("perm", perms[0]), ("down_perm", perms[1])):
            self.register_buffer(name, tensor, persistent=False)
        self.sizes, self.schemes, self.activation = sizes, tuple(schemes), activation
        self.num_experts = sizes.experts
        layouts, computes = [str(s.layout) for s in schemes], [s.compute for s in schemes]
        self._settings = (*layouts, sizes.width, *computes, activation)

    @classmethod
    def from_experts(cls, source: nn.Module, schemes: Sequence[Scheme], activation: str) -> QuantExperts:
        """Quantize (or take over) one expert after the other."""
        sizes = source.sizes if isinstance(source, StoredExperts) else sizes_of(source)
        weights: list[Tensor | None] = [None, None]
        perms: list[list[Tensor | None]] = [[], []]
        for expert, (both, down, *orders) in enumerate(_experts_of(source, schemes, sizes)):
            for i, (part, k) in enumerate(((both, sizes.hidden), (down, sizes.width))):
                packed = pack(part, schemes[i].layout, k)
                if (whole := weights[i]) is None:
                    shape = (sizes.experts, *packed.shape)
                    weights[i] = whole = huge_pages.empty(shape, packed.dtype, packed.device)
                whole[expert] = packed
                perms[i].append(orders[i])
        assert weights[0] is not None and weights[1] is not None
        stacked = _stacked(perms[0], sizes.hidden), _stacked(perms[1], sizes.width)
        return cls(weights[0], weights[1], stacked, sizes, schemes, activation)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return [M, H] for tokens [M, H], the numbers of their experts [M, k] and the experts' weights [M, k]."""
        held = self._buffers
        tensors = held["gate_up"], held["down"], held["perm"], held["down_perm"]
        return _quant_experts(hidden_states, top_k_index, top_k_weights, *tensors, *self._settings)

    def perms(self) -> Iterator[tuple[str, Tensor | None]]:
        """Yield name ("3.gate_proj") and perm of every linear of the experts."""
        for expert, names in enumerate(part_names(self.sizes.experts)):
            perm, down_perm = self._perms(expert)
            yield from zip(names, (perm, perm, down_perm), strict=True)

    def _perms(self, expert: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the orders of an expert's columns, None where they are those of the input features."""
        found = [None if p is None else p[expert] for p in (self.perm, self.down_perm)]
        own = [None if p is None or torch.equal(p, _identity(len(p))) else p for p in found]
        return own[0], own[1]

    def canonical(self, expert: int) -> tuple[Canonical, Canonical, Canonical]:
        """Return the tensors of an expert's gate, up and down."""
        rows = 2 * (-(-self.sizes.width // 16) * 16)
        both = unpack(self.gate_up[expert], self.schemes[0].layout, rows, self.sizes.hidden)
        down = unpack(self.down[expert], self.schemes[1].layout, self.sizes.hidden, self.sizes.width)
        return *split_interleaved(both, self.sizes.width), down

    def scheme_of(self, name: str) -> Scheme:
        """Return the scheme of a linear by its name ("3.gate_proj")."""
        return self.schemes[int(name.endswith(PARTS[-1]))]

    def weight_of(self, name: str) -> Tensor:
        """Return the float32 weight [N, K] of a linear by its name."""
        number, _, part = name.partition(".")
        return self._weights(int(number))[PARTS.index(part)]

    def _weights(self, expert: int) -> list[Tensor]:
        perm, down_perm = self._perms(expert)
        inputs = ((0, self.sizes.hidden, perm), (0, self.sizes.hidden, perm), (1, self.sizes.width, down_perm))
        return [
            unpermuted(dequantize(*part, self.schemes[i].layout, k), order)
            for part, (i, k, order) in zip(self.canonical(expert), inputs, strict=True)
        ]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return the weights that this layer stands for as transformers keeps them: gate_up_proj and down_proj."""
        count, hidden, width = self.sizes
        gate_up = torch.empty(count, 2 * width, hidden, dtype=dtype)
        down = torch.empty(count, hidden, width, dtype=dtype)
        for expert in range(count):
            weights = self._weights(expert)
            for place, weight in zip((*gate_up[expert].split(width), down[expert]), weights, strict=True):
                place.copy_(weight)
        return dict(zip(_JOINED, (gate_up, down), strict=True))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        names = self.perms()
        for expert in range(self.sizes.experts):
            for part, (name, perm) in zip(self.canonical(expert), names, strict=False):
                write_state(destination, f"{prefix}{name}.", part, None, perm)

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
        (count, hidden, width), (up_scheme, down_scheme) = self.sizes, self.schemes
        try:
            for expert, names in enumerate(part_names(count)):
                perm, down_perm = self._perms(expert)
                keys = [f"{prefix}{name}." for name in names]
                both = [read_state(state_dict, key, up_scheme.layout, width, hidden, perm) for key in keys[:2]]
                down = read_state(state_dict, keys[2], down_scheme.layout, hidden, width, down_perm)
                self.gate_up[expert] = pack(interleave(*both), up_scheme.layout, hidden)
                self.down[expert] = pack(down, down_scheme.layout, width)
        except RuntimeError as error:
            errors.append(f"{prefix[:-1]}: {error}")

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        count, hidden, width = self.sizes
        layouts = ", ".join(dict.fromkeys(str(s.layout) for s in self.schemes))
        computes = ", ".join(dict.fromkeys(s.compute for s in self.schemes))
        return f"experts={count}, hidden={hidden}, width={width}, {layouts}, compute={computes}, {self.activation}"


def _widest(layouts: set[Layout]) -> Layout:
    """Return the layout that holds weights of all these."""
    if len(layouts) == 1:
        return next(iter(layouts))
    result = {replace(layout, asymmetric=True) for layout in layouts if layout.format.integer}
    if len(result) != 1 or not all(layout.format.integer for layout in layouts):
        found = ", ".join(sorted(map(str, layouts)))
        raise RuntimeError(f"experts of one layer are stored in different formats ({found})")
    return result.pop()


def _in_layout(part: Canonical, layout: Layout) -> Canonical:
    """Return a weight with zeros written out if its layout is asymmetric."""
    if not layout.asymmetric or part.zeros is not None:
        return part
    return part._replace(zeros=torch.full(part.scales.shape, layout.format.zero, dtype=torch.uint8))


_Expert = tuple[Canonical, Canonical, Tensor | None, Tensor | None]


def _experts_of(source: nn.Module, schemes: Sequence[Scheme], sizes: ExpertSizes) -> Iterator[_Expert]:
    """Yield (gate and up interleaved, down, their perms) of each expert."""
    if isinstance(source, StoredExperts):
        for gate, up, down in source.linears():
            used = zip((gate, up, down), (schemes[0], *schemes), strict=True)
            parts = [_in_layout(canonical_of(linear, scheme), scheme.layout) for linear, scheme in used]  # type: ignore[arg-type]
            yield interleave(*parts[:2]), parts[2], perm_of(gate), perm_of(down)
        return
    gate_up, downs = _joined(source)
    for both, down in zip(gate_up.detach(), downs.detach(), strict=True):
        rounded = quantized(both, schemes[0])
        halves = (narrow(rounded, start, sizes.width) for start in (0, sizes.width))
        yield interleave(*halves), quantized(down, schemes[1]), None, None


def _identity(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.int32)


def _stacked(perms: list[Tensor | None], size: int) -> Tensor | None:
    if all(perm is None for perm in perms):
        return None
    return torch.stack([_identity(size) if perm is None else perm for perm in perms])
