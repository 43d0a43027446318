"""Objects that stand for a method of one model."""

from __future__ import annotations

import weakref
from typing import Any


class StandIn:
    """Refers to the model weakly, so that deleting the model frees it; belongs to the copy when the model is copied or pickled."""

    def __init__(self, model: Any, *arguments: Any) -> None:
        """Keep what a copy is made from: the model, and the other arguments of the subclass's constructor."""
        self._reference: weakref.ref[Any] = weakref.ref(model)
        self._arguments = arguments

    @property
    def model(self) -> Any:
        """The model; ReferenceError if it is gone, as after ``make_model().generate(...)``: nobody but the stand-in refers to it then."""
        model = self._reference()
        if model is None:
            raise ReferenceError("the model is gone: keep it in a variable while one of its methods runs")
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Belong to the copy of the model."""
        return type(self)(memo.get(id(self.model), self.model), *self._arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a reference to the model."""
        return type(self), (self.model, *self._arguments)
