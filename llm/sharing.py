"""A copy of a model's structure over the same weights."""

from __future__ import annotations

import copy
from typing import Any


def share_copy(model: Any) -> Any:
    """Return a copy of a model's modules and configuration whose parameters and buffers are the model's own."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)
