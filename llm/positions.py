"""Learned position tables that say what is wrong when a sequence is longer than they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

#: Subclasses made, so that equal modules have equal classes.
_classes: dict[Any, Any] = {}


def with_limit(cls: Any) -> Any:
    """Return a subclass of an embedding class whose look-up past the end raises ValueError instead of "index out of range"."""

    if cls in _classes:
        return _classes[cls]

    def forward(self: nn.Embedding, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return cls.forward(self, *args, **kwargs)
        except IndexError:
            rows = self.num_embeddings
            raise ValueError(f"the sequence is too long: the model's position table has {rows} rows") from None

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _empty, (cls,), self.__dict__

    _classes[cls] = type(f"{cls.__name__}WithLimit", (cls,), {"forward": forward, "__reduce_ex__": reduce})
    return _classes[cls]


def _empty(cls: type[nn.Embedding]) -> nn.Embedding:
    limited = with_limit(cls)
    return limited.__new__(limited)
