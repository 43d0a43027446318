"""Smoothing factors move into what comes before a linear, where that is exact: no token is multiplied by them any more.

The norm's weight takes the factors of the linears that alone read its output; the rows of a linear's weight take those of the one
that it feeds (values and output, up and down). Places are found by trial, llm/algorithms/folding.py, on random tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms.folding import Finder, Target
from ..algorithms.walk import Walk, layer_list
from ..linear import Scheme
from ..plan import Plan
from .linear import InputCodes

_TOKENS = 32
#: How far a norm's factors, as its dtype stores them, may be from the ones of the calibration: beside the codes' range.
_TOLERANCE = 0.01


@dataclass
class Folds:
    """What became of the factors of a model's static linears.

    Args:
        columns: by linear whose input comes multiplied: the factors [K], exactly as what comes before has them.
        rows: by linear that multiplies its own output: the factors [N].
        parameters: by full name, the norms' new parameters.
        places: by linear of `columns`, the name in its layer of the module that multiplies.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def source(self, name: str, linear: Any) -> Any:
        """Return a linear with its outputs multiplied; the given one if there is nothing to do."""
        rows = self.rows.get(name)
        if rows is None:
            return linear
        new = nn.Linear(linear.in_features, linear.out_features, device="meta")
        new.weight = nn.Parameter(linear.weight.detach().float() * rows[:, None], False)
        bias = linear.bias
        new.register_parameter("bias", None)
        if bias is not None:
            new.bias = nn.Parameter((bias.detach().float() * rows).to(bias.dtype), False)
        return new


def find_folds(
    model: Any, plan: Plan, inputs: Mapping[str, InputCodes], schemes: Mapping[str, Scheme], dtype: torch.dtype | None
) -> Folds:
    """Return where the factors of a floating-point model's linears can go.

    Args:
        model: not changed.
        plan: says which modules are norms.
        inputs: of the linears that will be static.
        schemes: of the same.
        dtype: that norms will have; None: as they are.

    Raises:
        Exception: anything that the model's own code raises for a few random tokens.
    """
    folds, finder = Folds(), Finder(plan)
    try:
        layer_list(model, schemes)
    except ValueError:  # nothing but a head
        return folds
    size = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(size, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        walk = Walk(model, schemes, [tokens])
        known: dict[Any, list[tuple[list[str], Target | None]]] = {}
        for index in range(len(walk)):
            prefix = f"{walk.list_name}.{index}."
            names = tuple(n.removeprefix(prefix) for n in schemes if n.startswith(prefix))
            key = (type(model.get_submodule(prefix[:-1])), names)
            if key not in known:  # layers of a class are of one structure, as they are to the finder
                layer = walk.layer(index)
                known[key] = [(group.names, finder.find(layer, group)) for group in layer.groups]
            for group, target in known[key]:
                if target is not None and finder.applies(target, prefix, names):
                    _fold(model, folds, prefix, group, target, inputs, dtype)
            walk.skip(index)
    return folds


def _fold(
    model: Any,
    folds: Folds,
    prefix: str,
    names: list[str],
    target: Target,
    inputs: Mapping[str, InputCodes],
    dtype: torch.dtype | None,
) -> None:
    """Enter what the factors of linears with one input become, unless they disagree or the place cannot take them."""
    place, group = prefix + target.name, [prefix + name for name in names]
    factors, module = inputs[group[0]].factors, model.get_submodule(place)
    per_channel = target.per_channel(factors)
    same = all(torch.equal(inputs[name].factors, factors) for name in group)
    if not same or not torch.equal(per_channel[target.channels], factors):
        return
    if place in inputs:
        rows = torch.ones(module.out_features)
        rows[target.rows] = per_channel
        folds.rows[place] = rows
    else:
        found = _norm_parameters(module, per_channel, target.offset or 0.0, dtype)
        if found is None:
            return
        parameters, factors = found
        folds.parameters.update({f"{place}.{name}": value for name, value in parameters.items()})
    for name in group:
        folds.columns[name], folds.places[name] = factors, target.name


def _norm_parameters(
    norm: Any, factors: Tensor, offset: float, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], Tensor] | None:
    """Return a norm's parameters that multiply by factors, and the factors that they have once rounded; None if too far off."""
    stored = dtype or norm.weight.dtype
    old = norm.weight.detach().float() + offset
    weight = (old * factors - offset).to(stored)
    exact = torch.where(old == 0, factors, (weight.float() + offset) / old)
    if not bool(((exact / factors - 1).abs() <= _TOLERANCE).all()):
        return None
    parameters = {"weight": weight}
    if (bias := getattr(norm, "bias", None)) is not None:
        parameters["bias"] = (bias.detach().float() * exact).to(stored)
    return parameters, exact
