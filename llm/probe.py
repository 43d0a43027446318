"""Numeric probes: does a module compute what its replacement computes? Asked once per class, on small random numbers.

A probe runs the module's own forward with small random weights in place of its own (a shallow copy; the model is not touched)
and compares with the formula that would replace it. What does not agree is not replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .norm import rms_norm_eps, stand_in
from .rope import ROTATIONS, Rotation

_TOLERANCE = 1e-5
#: Epilogue name -> the function that it computes.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def _agree(a: Any, b: Tensor) -> bool:
    return (
        isinstance(a, Tensor)
        and a.shape == b.shape
        and bool(torch.isfinite(a).all())
        and bool((a - b).abs().max() <= _TOLERANCE * b.abs().max())
    )


def _attempt(function: Callable[[], Any]) -> Any:
    """Return the function's result with a fixed random state, or None if it raises: the module is not what it seems."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs too
        try:
            return function()
        except Exception:  # a foreign forward may raise anything
            return None


@contextmanager
def usual_tensors() -> Iterator[None]:
    """Make tensors on the CPU in float32, also where transformers builds a model of another dtype on the meta device."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def probe_rms_norm(module: nn.Module, offset: float) -> bool:
    """Return whether the module is ``x / sqrt(mean(x^2) + eps) * (weight + offset)``; x is small, so that eps shows."""

    def run() -> bool:
        clone = stand_in(module)
        eps = rms_norm_eps(module)
        assert eps is not None
        for size in (1.0, 1e-3):
            x = size * torch.randn(3, 5, 8)
            weight: Any = clone.weight
            expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + offset)
            if not _agree(clone(x), expected):
                return False
        return True

    return bool(_attempt(run))


def probe_activation(activation: Any) -> str | None:
    """Return the name in `ACTIVATIONS` of a function or module, or None."""
    x = torch.cat((torch.linspace(-8, 8, 201), torch.tensor([0.0])))
    y = _attempt(lambda: activation(x.clone()))
    return next((name for name, function in ACTIVATIONS.items() if y is not None and _same(y, function(x))), None)


def _same(a: Any, b: Tensor) -> bool:
    # gelu and its tanh approximation differ by 5e-4
    return isinstance(a, Tensor) and a.shape == b.shape and bool((a - b).abs().max() < 2e-6)


def _clone(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """Return a shallow copy of a module with some children replaced."""
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__.update(module.__dict__)
    clone.__dict__["_modules"] = {**module._modules, **children}
    return clone


def _linear(like: nn.Module, in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=getattr(like, "bias", None) is not None)


def probe_gated(module: nn.Module, names: tuple[str, ...], activation: str) -> bool:
    """Return whether the module is ``down(act(gate(x)) * up(x))``, with names of (gate, up, down) or (gate_up, down)."""

    def run() -> bool:
        old = module._modules
        first = 12 if len(names) == 3 else 24
        new = {name: _linear(old[name], 8, first) for name in names[:-1]}  # type: ignore[arg-type]
        new[names[-1]] = _linear(old[names[-1]], 12, 8)  # type: ignore[arg-type]
        x = torch.randn(2, 3, 8)
        gate, up = (new[n](x) for n in names[:2]) if len(names) == 3 else new[names[0]](x).chunk(2, -1)
        expected = new[names[-1]](ACTIVATIONS[activation](gate) * up)
        return _agree(_clone(module, dict(new))(x), expected)

    return bool(_attempt(run))


def probe_experts(module: nn.Module, activation: str) -> bool:
    """Return whether the module is, for tokens x, indices and weights of experts, sum_j weight_j * down_j(act(gate_j(x)) * up_j(x)).

    Args:
        module: with gate_up_proj [E, 2 I, H] and down_proj [E, H, I], also on the meta device.
        activation: in `ACTIVATIONS`.
    """

    def run() -> bool:
        count = module._parameters["gate_up_proj"].shape[0]  # type: ignore[union-attr]
        gate_up, down = torch.randn(count, 64, 16), torch.randn(count, 16, 32)
        clone = _clone(module, {})
        new = {"gate_up_proj": nn.Parameter(gate_up, False), "down_proj": nn.Parameter(down, False)}
        clone.__dict__["_parameters"] = {**module._parameters, **new}
        x, weights = torch.randn(5, 16), torch.rand(5, min(2, count))
        indices = torch.rand(5, count).topk(weights.shape[1]).indices
        expected = torch.zeros(5, 16)
        for j in range(weights.shape[1]):
            both, last = gate_up[indices[:, j]], down[indices[:, j]]
            gate, up = torch.einsum("mrh,mh->mr", both, x).chunk(2, -1)
            part = torch.einsum("mhi,mi->mh", last, ACTIVATIONS[activation](gate) * up)
            expected += weights[:, j, None] * part
        return _agree(clone(x, indices, weights), expected)

    return bool(_attempt(run))


class _NoAttention(nn.Module):
    """Stands for a child that returns (hidden, extra): no contribution to the residual stream."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        hidden = args[0] if args else kwargs["hidden_states"]
        return torch.zeros_like(hidden), None


def probe_fold(module: nn.Module, first: str, activation: str, second: str) -> bool:
    """Return whether the activation may move into the first linear: the module's forward gives the same either way."""

    def run() -> bool:
        old = module._modules
        others: dict[str, nn.Module] = {}
        for name, child in old.items():
            if child is None or name in (first, second, activation):
                continue
            simple = isinstance(child, nn.LayerNorm | nn.Dropout | nn.Identity)
            others[name] = nn.Identity() if simple else _NoAttention()
        linears = {first: _linear(old[first], 8, 12), second: _linear(old[second], 12, 8)}  # type: ignore[arg-type]
        x = torch.randn(2, 3, 8)
        act = old[activation]
        apart = _clone(module, {**others, **linears})(x)
        folded = {first: nn.Sequential(linears[first], act), activation: nn.Identity()}  # type: ignore[arg-type]
        together = _clone(module, {**others, **linears, **folded})(x)
        return _agree(apart, together) and not _agree(
            _clone(module, {**others, **linears, activation: nn.Identity()})(x), together
        )

    return bool(_attempt(run))


def probe_rotation(original: Rotation, style: str) -> bool:
    """Return whether the original function is the rotation of this style, whole and partial."""

    def run() -> bool:
        for width, rotary in ((8, 8), (12, 8)):
            q, k = torch.randn(2, 3, 4, width), torch.randn(2, 1, 4, width)
            angles = torch.randn(2, 4, rotary // 2).repeat(1, 1, 2)
            cos, sin = 1.25 * angles.cos(), 1.25 * angles.sin()
            try:
                expected = original(q, k, cos, sin)
            except RuntimeError:
                if width == rotary:
                    raise
                continue  # this family rotates whole heads only
            got = ROTATIONS[style](q, k, cos, sin)
            if not all(_agree(a, b) for a, b in zip(got, expected, strict=True)):
                return False
        return True

    return bool(_attempt(run))
