"""Captures a Python function as a graph: ATen and llmrt operators before dispatch, sizes and integers symbolic.

What the function decided by looking at a size holds for other sizes only as far as the recorded guards say; `Captured.condition`
evaluates them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import SymInt
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.printers import PythonPrinter

from .retrace import trace


@contextmanager
def quiet_modes() -> Iterator[None]:
    """Run without the caller's dispatch modes, inference mode, autocast and gradients: a capture is nobody else's business."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
        yield


class Captured:
    """A captured graph and the sizes that it is valid for.

    Attributes:
        module: the graph; rewrites may change it as long as they keep its inputs.
        sizes: names of the symbolic sizes, in the order of their making.
    """

    def __init__(self, module: GraphModule, env: ShapeEnv, symbols: Mapping[str, Any]) -> None:
        """Keep what the guards are made from."""
        self.module, self.sizes = module, tuple(symbols)
        self._env, self._symbols = env, symbols

    def guards(self) -> list[str]:
        """Return what must hold, as Python expressions over `sizes`; rewrites of the graph may have added some."""
        names = {symbol: name for name, symbol in self._symbols.items()}
        printer = PythonPrinter()
        found: dict[str, None] = {}
        for guard in self._env.guards:
            expression = guard.expr.subs({symbol: type(symbol)(name, integer=True) for symbol, name in names.items()})
            found[printer.doprint(expression)] = None
        return [text for text in found if text != "True"]

    def condition(self, names: Sequence[str] | None = None) -> Callable[..., bool]:
        """Return a function that tells whether the graph may be used.

        Args:
            names: its arguments, in this order: all of `sizes`, maybe others. Default: `sizes`.
        """
        text = " and ".join(f"({guard})" for guard in self.guards()) or "True"
        function: Callable[..., bool] = eval(f"lambda {', '.join(names or self.sizes)}: {text}", {"math": math})
        return function


class Capture:
    """Makes symbolic sizes and fake inputs, then traces.

    A size that is 1 should be given as the number 1: a graph for one row or one token is another graph.
    """

    def __init__(self) -> None:
        """Start without sizes; no two sizes are taken for the same because they happen to be equal."""
        self.env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.symbols: dict[str, Any] = {}

    def size(self, name: str, value: int, least: int = 0) -> SymInt:
        """Return a symbolic integer.

        Args:
            name: a Python identifier.
            value: of the call that is being captured; the graph is valid for it.
            least: what it will never be below.
        """
        source = ConstantSource(name)
        symbol = self.env.create_symbol(value, source, dynamic_dim=DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)
        self.env.constrain_symbol_range(symbol, least, int(torch.iinfo(torch.int64).max))
        self.symbols[name] = symbol
        result = self.env.create_symintnode(symbol, hint=value, source=source)
        assert isinstance(result, SymInt)
        return result

    def tensor(self, shape: Sequence[int | SymInt], dtype: torch.dtype, device: torch.device | str) -> Any:
        """Return a fake contiguous tensor."""
        with quiet_modes(), self.mode:
            return torch.empty(tuple(shape), dtype=dtype, device=device)

    def trace(self, function: Callable[..., Any], inputs: Sequence[Any]) -> Captured:
        """Return the graph of ``function(*inputs)``, which returns tensors in lists, tuples and dicts.

        Args:
            function: reads parameters and other real tensors as it likes; they become constants of the graph.
            inputs: tensors and sizes of this capture.

        Raises:
            Exception: whatever the function raises over tensors that have no values, above all if it looks at one.
        """
        with quiet_modes():
            module = trace(function, inputs, self.mode)
        for node in module.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
            module.graph.erase_node(node)  # the graph runs without gradients anyway
        first = next(node for node in module.graph.nodes if node.op != "placeholder")
        for node in module.graph.find_nodes(op="get_attr"):
            if node is not first:
                first.prepend(node)  # a rewrite may need it before its first use
        module.graph.eliminate_dead_code()
        module.recompile()
        return Captured(module, self.env, self.symbols)
