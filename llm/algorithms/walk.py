"""Walks through a model's decoder layers one by one, each on the outputs of the already quantized ones before it.

The given model is never changed. A copy of its structure over the same weights makes the layers' arguments (masks, rotations, ...) by its
own code: its layers are stood in for by functions, so that a call reaches the one layer under work with the hidden states
kept here. Beside the samples' hidden states and the results, one layer is in memory, in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..experts import is_experts
from ..linear import Scheme
from ..plan import is_linear
from ..sharing import share_copy


class _Stop(Exception):
    """Everything that was wanted has been computed."""


@dataclass
class Group:
    """Linears of a layer that read the very same tensor.

    Args:
        names: in the layer, in the order of their calls.
        once: whether each is called once per pass.
    """

    names: list[str]
    once: bool = True


@dataclass
class Layer:
    """One decoder layer under work.

    Args:
        name: in the model.
        module: a float32 copy that may be changed.
        schemes: of its linears that are to be quantized, by their names in the layer.
        groups: linears by common input, in the order of their calls, whether quantized or not.
    """

    walk: Walk
    index: int
    name: str
    module: nn.Module
    schemes: dict[str, Scheme]
    groups: list[Group] = field(default_factory=list)

    def linear(self, name: str) -> nn.Linear:
        """Return one of its linears."""
        return self.module.get_submodule(name)  # type: ignore[return-value]

    def full(self, name: str) -> str:
        """Return the name in the model of a module of this layer."""
        return f"{self.name}.{name}"

    def run(self, sample: int, tokens: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the layer's output [1, S, H] for a sample, or for its first tokens; dtype: of the module."""
        return self.walk.run_layer(self, sample, tokens, dtype)

    def visit_inputs(self, wanted: Iterable[Group], use: Callable[[Group, Tensor], None]) -> None:
        """Run all samples and call use(group, x [T, K]) with the input of each wanted group; stops behind the last one."""
        wanted = list(wanted)
        last = wanted[-1] if all(group.once for group in wanted) else None

        def hook(group: Group) -> Callable[..., None]:
            def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                use(group, args[0].flatten(0, -2))
                if group is last:
                    raise _Stop

            return see

        with ExitStack() as stack:
            for group in wanted:
                handle = self.linear(group.names[0]).register_forward_pre_hook(hook(group))
                stack.callback(handle.remove)
            for sample in range(len(self.walk.hidden)):
                try:
                    self.run(sample)
                except _Stop:
                    continue

    def find_groups(self) -> None:
        """Fill `groups` from as many samples as it takes to see every linear that is to be quantized called."""
        calls: list[tuple[str, Tensor]] = []
        linears = {name: m for name, m in self.module.named_modules() if is_linear(m)}
        with ExitStack() as stack:
            for name, linear in linears.items():
                note = lambda m, args, name=name: calls.append((name, args[0]))  # noqa: E731
                stack.callback(linear.register_forward_pre_hook(note).remove)
            seen: set[str] = set()
            for sample in range(len(self.walk.hidden)):
                calls.clear()
                self.run(sample)
                self._enter(calls, seen)
                if seen >= set(self.schemes):
                    return

    def _enter(self, calls: list[tuple[str, Tensor]], seen: set[str]) -> None:
        groups: list[tuple[Tensor, Group]] = []
        for name, x in calls:
            group = next((g for tensor, g in groups if tensor is x), None)
            if group is None:
                group = Group([])
                groups.append((x, group))
            group.names.append(name)
        names = [name for name, _ in calls]
        for _, group in groups:
            fresh = [n for n in dict.fromkeys(group.names) if n not in seen]
            if fresh:
                self.groups.append(Group(fresh, all(names.count(n) == 1 for n in fresh)))
                seen.update(fresh)


class Walk:
    """The decoder layers of a model and the hidden states before the one under work.

    Args:
        model: not changed.
        schemes: of all linears that are to be quantized, by full name.
        tokens: int64 [1, S] each.

    Raises:
        ValueError: the model has no list of layers that hold these linears.
    """

    def __init__(self, model: Any, schemes: Mapping[str, Scheme], tokens: list[Tensor]) -> None:
        """Run the model up to its first layer."""
        self.model, self.schemes, self.tokens = model, dict(schemes), tokens
        self.list_name = layer_list(model, schemes)
        self.runner = share_copy(model)
        self._layers = list(self.runner.get_submodule(self.list_name).children())
        self.hidden: list[Tensor] = []
        for sample in range(len(tokens)):
            self._layers[0].forward = self._catch
            self._call(sample, None)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._layers)

    def outside(self) -> list[str]:
        """Return the linears to be quantized that are in none of the layers."""
        return [name for name in self.schemes if not name.startswith(self.list_name + ".")]

    def layer(self, index: int) -> Layer:
        """Return a layer to work on; to be taken in order, and closed by `finish`."""
        name = f"{self.list_name}.{index}"
        schemes = {n.removeprefix(name + "."): s for n, s in self.schemes.items() if n.startswith(name + ".")}
        module = copy.deepcopy(self.model.get_submodule(name)).float().requires_grad_(False)
        for experts in filter(
            is_experts, module.modules()
        ):  # a copy of the configuration; the usual form takes no float64
            experts.config._experts_implementation = "eager"
        layer = Layer(self, index, name, module, schemes)
        layer.find_groups()
        return layer

    def finish(self, layer: Layer) -> None:
        """Go on to the next layer: its inputs are what this one, as it is now, gives.

        Raises:
            ValueError: the output has NaN or infinite values.
        """
        for sample in range(len(self.hidden)):
            out = layer.run(sample)
            if not bool(torch.isfinite(out).all()):
                raise ValueError(f"{layer.name} gives NaN or infinite values for calibration sample {sample}")
            self.hidden[sample] = out
        self._layers[layer.index].forward = self._pass_on

    def skip(self, index: int) -> None:
        """Go on to the next layer with the inputs of this one."""
        self._layers[index].forward = self._pass_on

    def run_layer(self, layer: Layer, sample: int, tokens: int | None, dtype: torch.dtype) -> Tensor:
        """See `Layer.run`."""
        hidden, out = self.hidden[sample][:, :tokens].to(dtype), None

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal out
            args, kwargs = _converted(args, dtype), _converted(kwargs, dtype)
            if args:
                args = (hidden, *args[1:])
            else:
                kwargs["hidden_states"] = hidden
            result = layer.module(*args, **kwargs)
            out, self._tuple = (result[0], True) if isinstance(result, tuple) else (result, False)
            raise _Stop

        self._layers[layer.index].forward = forward
        self._call(sample, tokens)
        if out is None:  # a hook has seen enough
            raise _Stop
        return out

    def outside_inputs(self, names: Iterable[str], use: Callable[[str, Tensor], None]) -> None:
        """Call use(name, x [T, K]) with the inputs of linears outside of the layers; all layers must be finished."""
        with ExitStack() as stack:
            for name in names:
                see = lambda m, args, name=name: use(name, args[0].flatten(0, -2).float())  # noqa: E731
                stack.callback(self.runner.get_submodule(name).register_forward_pre_hook(see).remove)
            for sample, hidden in enumerate(self.hidden):
                final = hidden.to(self.model.dtype)
                self._layers[-1].forward = lambda *args, final=final, **kwargs: self._result(final)
                self._call(sample, None)

    def _call(self, sample: int, tokens: int | None) -> None:
        try:
            self.runner(input_ids=self.tokens[sample][:, :tokens], use_cache=False)
        except _Stop:
            return

    def _catch(self, *args: Any, **kwargs: Any) -> Any:
        self.hidden.append((args[0] if args else kwargs["hidden_states"]).float())
        raise _Stop

    def _pass_on(self, *args: Any, **kwargs: Any) -> Any:
        """Stand for a layer before the one under work, which does not look at what it is given."""
        return self._result(args[0] if args else kwargs["hidden_states"])

    def _result(self, hidden: Tensor) -> Any:
        return (hidden, None) if self._tuple else hidden


def _converted(value: Any, dtype: torch.dtype) -> Any:
    """Return arguments with every floating tensor in a dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _converted(item, dtype) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_converted(item, dtype) for item in value)
    return value


def layer_list(model: nn.Module, names: Iterable[str]) -> str:
    """Return the name of the module list that holds most of these linears: the decoder's layers.

    Raises:
        ValueError: no list holds any.
    """
    names = list(names)
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    inside = {name: sum(n.startswith(name + ".") for n in names) for name in lists}
    best = max(inside, key=lambda name: (inside[name], -len(name)), default=None)
    if best is None or not inside[best]:
        raise ValueError(f"{type(model).__name__} has no list of layers with the linears to quantize; use method='rtn'")
    return best
