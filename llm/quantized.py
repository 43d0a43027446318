"""Which linears of a model are quantized, and how: what saving writes down, and the way back to floating point."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.formats import SCALE_DTYPES, Layout
from .cache import KV_DTYPE
from .experts import QuantExperts, is_experts
from .linear import CanonicalLinear, LinearGroup, QuantLinear, SiblingLinear
from .mlp import QuantGatedMLP
from .quantization import WeightOnlyQuantConfig

_SCALE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


class QuantizedLinear(NamedTuple):
    """A linear of an optimized model under its original name.

    Args:
        name: full.
        layout: of the weight.
        perm: int32 [K] or None.
        bias: [N] or None.
        weight: gives the float32 weight [N, K].
    """

    name: str
    layout: Layout
    perm: Tensor | None
    bias: Tensor | None
    weight: Callable[[], Tensor]


def quantized_linears(model: nn.Module) -> Iterator[QuantizedLinear]:
    """Yield every quantized linear of an optimized model."""
    for name, module in model.named_modules():
        if isinstance(module, SiblingLinear):
            group = module.group
            yield QuantizedLinear(name, group.layout, group.perm, group.member_bias(module.index), module.dequantized)
        elif isinstance(module, QuantGatedMLP):
            for part, bias in zip(module.names[:-1], module.biases(), strict=True):
                full = f"{name}.{part}" if name else part
                yield QuantizedLinear(full, module.layout, module.perm, bias, _part_of(module, part))
        elif isinstance(module, QuantExperts):
            for part, perm in module.perms():
                layout = module.scheme_of(part).layout
                yield QuantizedLinear(f"{name}.{part}", layout, perm, None, _expert_of(module, part))
        elif isinstance(module, QuantLinear) and not isinstance(module, LinearGroup):
            yield QuantizedLinear(name, module.layout, module.perm, module.bias, module.dequantized)


def _part_of(module: QuantGatedMLP, part: str) -> Callable[[], Tensor]:
    return lambda: module.dequantized()[part]


def _expert_of(module: QuantExperts, part: str) -> Callable[[], Tensor]:
    return lambda: module.weight_of(part)


def floating_modules(model: nn.Module) -> list[str]:
    """Return the linears, and the experts as a whole, that are floating point."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) or is_experts(m)]


def stored_config(model: Any, compute_dtype: str = "auto", source: str | None = None) -> WeightOnlyQuantConfig:
    """Return the configuration of a model whose quantized linears are `CanonicalLinear`s, the others staying floating point.

    The most frequent layout is the configuration's; the linears that have another one are named in `layouts` when it is saved.
    """
    layouts = Counter(m.layout for m in model.modules() if isinstance(m, CanonicalLinear))
    most = layouts.most_common(1)[0][0] if layouts else WeightOnlyQuantConfig().layout()
    return WeightOnlyQuantConfig(
        weight_dtype=most.weight_dtype,
        compute_dtype=compute_dtype,
        scale_dtype=_SCALE_NAMES[most.scale_dtype],
        scheme="asym" if most.asymmetric else "sym",
        group_size=most.group_size,
        lm_head=False,
        floating_modules=floating_modules(model),
        source=source,
    )


def added_biases(model: nn.Module) -> list[str]:
    """Return the linears that got a bias which the model's class does not give them."""
    return [name for name, m in model.named_modules() if isinstance(m, CanonicalLinear) and m.added_bias]


def saved_config(model: Any, config: WeightOnlyQuantConfig, biased: list[str]) -> WeightOnlyQuantConfig:
    """Return what config.json shall say of an optimized model.

    Args:
        model: optimized.
        config: that it was optimized with.
        biased: see `added_biases`.
    """
    head = model.get_output_embeddings()
    head_name = next((name for name, m in model.named_modules() if m is head), None)
    general = replace(config, floating_modules=None, layouts=None, modules_to_not_convert=None)
    found = list(quantized_linears(model))
    layouts = {q.name: str(q.layout) for q in found if q.layout != general.layout_of(q.name, q.name == head_name)}
    return replace(
        config,
        floating_modules=floating_modules(model),
        layouts=layouts or None,
        permuted_modules=[q.name for q in found if q.perm is not None] or None,
        biased_modules=biased or None,
    )


def restore_floats(model: Any, dtype: torch.dtype) -> Any:
    """Turn an optimized model into the plain transformers model that it stands for, in place.

    Args:
        model: whose quantized linears become floating point. Everything that `optimize` put in is gone afterwards.
        dtype: of the weights that were quantized.
    """
    plain = _bare_twin(model)
    quantized = {q.name: q for q in quantized_linears(model)}
    quantized_experts = {name: m for name, m in model.named_modules() if isinstance(m, QuantExperts)}
    done: dict[int, nn.Parameter] = {}
    for path, module in plain.named_modules():
        if (found := quantized.get(path)) is not None:
            module._parameters["weight"] = nn.Parameter(found.weight().to(dtype), requires_grad=False)
            _set_bias(path, module, found.bias)
            continue
        if (experts := quantized_experts.get(path)) is not None:
            for name, weight in experts.dequantized(dtype).items():
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)
            continue
        for name in [n for n, p in module._parameters.items() if p is not None]:
            old = model.get_parameter(f"{path}.{name}" if path else name)
            module._parameters[name] = done.setdefault(id(old), old)
        for name in [n for n, b in module._buffers.items() if b is not None]:
            module._buffers[name] = model.get_buffer(f"{path}.{name}" if path else name)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.train(model.training)
    model.__dict__.clear()
    model.__dict__.update(plain.__dict__)
    return model


def _bare_twin(model: Any) -> Any:
    """Return a model of the same class on the meta device, configured as it was before `optimize`."""
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config(decoder=True)):
        for name in ("quantization_config", KV_DTYPE):
            if hasattr(part, name):
                delattr(part, name)
    with torch.device("meta"):
        return type(model)._from_config(config, attn_implementation=None)


def _set_bias(path: str, module: nn.Module, bias: Tensor | None) -> None:
    if bias is not None and module._parameters.get("bias") is None:
        warnings.warn(
            f"{path} has a bias that {type(module).__name__} of this model has no place for: the model computes with it, but "
            "save_pretrained and from_pretrained will lose it",
            stacklevel=2,
        )
    module._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
