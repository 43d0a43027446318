"""Rotary position embedding: the rotation that an attention module calls by a global name becomes the operator.

transformers' attention modules call a function of their own file by name. The copy of such a module's class made here has the
same forward code, bound to globals in which that one name is the operator; transformers' files and classes stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from .. import ops

_rope = ops.rope.overload

Rotation = Callable[..., tuple[Tensor, Tensor]]


def _rotation(interleaved: bool) -> Rotation:
    def apply_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim == 2:  # [B, S, H, D] already
            return _rope(q, k, cos, sin, None, cos.shape[-1], interleaved)
        q, k = _rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, None, cos.shape[-1], interleaved)
        return q.transpose(1, 2), k.transpose(1, 2)

    return apply_rotation


#: style -> function with the signature of transformers' `apply_rotary_pos_emb`: q [B, H, S, D], k [B, Hk, S, D], cos and
#: sin [B, S, R] with both halves equal.
ROTATIONS: dict[str, Rotation] = {"half": _rotation(False), "interleaved": _rotation(True)}


#: Subclasses made, so that equal modules have equal classes.
_classes: dict[tuple[Any, str, str], Any] = {}


def called_rotation(cls: type[nn.Module], name: str) -> Rotation | str | None:
    """Return the function that forward of `cls` calls by the global `name`; None if it calls none; a reason if unusable."""
    forward = cls.forward
    code = getattr(forward, "__code__", None)
    wrapped = getattr(forward, "__wrapped__", None)
    if wrapped is not None and name in getattr(getattr(wrapped, "__code__", code), "co_names", ()):
        return f"forward of {cls.__name__} is wrapped by a decorator"
    if code is None or name not in code.co_names:
        return None
    function = forward.__globals__.get(name)
    return function if callable(function) else f"{name} is not a function of {cls.__module__}"


def with_rotation(cls: Any, name: str, style: str) -> Any:
    """Return a subclass of `cls` whose forward calls the operator where `cls` calls `name`."""
    key = (cls, name, style)
    if key in _classes:
        return _classes[key]
    old = cls.forward
    # without __name__: by it, Dynamo would look globals up in the module of transformers
    scope = {key: value for key, value in old.__globals__.items() if key != "__name__"} | {name: ROTATIONS[style]}
    new = FunctionType(old.__code__, scope, old.__name__, old.__defaults__, old.__closure__)
    new.__module__ = old.__module__
    new.__kwdefaults__ = old.__kwdefaults__
    new.__doc__ = old.__doc__

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _empty, (cls, name, style), self.__dict__

    body = {"forward": new, "__reduce_ex__": reduce, "__doc__": cls.__doc__}
    _classes[key] = type(f"{cls.__name__}WithRope", (cls,), body)
    return _classes[key]


def _empty(cls: type[nn.Module], name: str, style: str) -> nn.Module:
    patched = with_rotation(cls, name, style)
    return patched.__new__(patched)
