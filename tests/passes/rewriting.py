"""Runs a function through the compile backend and keeps what the passes made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmrt.passes import REWRITES, RewriteReport, retrace, rewrite

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Rounding steps of a dtype that two ways to compute the same may be apart, relative to the largest value.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Rewritten:
    """A compiled function with its graphs and reports.

    Args:
        function: to compile; called with inference on.
        names: of the rewrites to apply; None: all.
        dynamic: the second dimension of every argument, the tokens, is dynamic.
    """

    def __init__(self, function: Callable[..., Any], names: Sequence[str] | None = None, dynamic: bool = False) -> None:
        torch._dynamo.reset()
        self.reports: list[RewriteReport] = []
        self.graphs: list[torch.fx.GraphModule] = []
        chosen = [one for one in REWRITES if names is None or one.name in names]

        def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
            traced = retrace(gm, inputs)
            self.reports.append(rewrite(traced, chosen, strict=True))
            self.graphs.append(traced)
            return traced.forward

        self.compiled = torch.compile(function, backend=backend, fullgraph=True)
        self.dynamic = dynamic

    def __call__(self, *args: Any) -> Any:
        for x in args:
            if self.dynamic and x.dim() > 2:
                torch._dynamo.maybe_mark_dynamic(x, self.tokens(x))
        with torch.inference_mode():
            return self.compiled(*args)

    @staticmethod
    def tokens(x: torch.Tensor) -> int:
        """Return the dimension that holds the tokens: behind the heads if those are strided like a transposed view."""
        return 2 if x.dim() == 4 and x.stride(2) > x.stride(1) else 1

    @property
    def fired(self) -> dict[str, int]:
        """What fired in the last graph."""
        return {name: count for name, count in self.reports[-1].fired.items() if count}

    @property
    def misses(self) -> list[str]:
        """Reasons of near misses in the last graph."""
        return [miss.reason for miss in self.reports[-1].near_misses]

    @property
    def calls(self) -> Counter[str]:
        """Calls of the last graph by name, views and getitem apart."""
        names = (str(n.target) for n in self.graphs[-1].graph.nodes if n.op == "call_function")
        views = ("reshape", "permute", "slice", "unsqueeze", "select", "expand", "getitem", "sym_size")
        return Counter(name for name in names if not any(view in name for view in views))


def assert_close(got: Any, expected: Any, dtype: torch.dtype) -> None:
    """Compare tensors or tuples of them, relative to the largest value."""
    if isinstance(expected, torch.Tensor):
        got, expected = [got], [expected]
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype and g.shape == e.shape
        if e.numel():
            error = (g.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1e-3)
            assert error <= TOLERANCE[dtype], f"error {float(error):.2g}"
