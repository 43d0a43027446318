"""AutoRound (Cheng et al. 2023, arXiv:2309.05516) through its own package, which tunes rounding and clipping by signed gradients.

The package leaves a model whose weights lie on the grid of the scales and zero points beside them; `on_grid` reads the codes back.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.formats import Layout, join_codes
from ..linear import Canonical, Scheme
from ..quantization import WeightOnlyQuantConfig
from .calibration import Samples

#: Part of a step that a weight may lie off its grid: what bfloat16 rounding of the largest code's value can make.
_OFF = 0.1


def package() -> ModuleType:
    """Return the package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("auto_round")
    except ImportError as error:
        raise ValueError(f"method 'autoround' needs the package auto-round ({error}): pip install auto-round") from None


def on_grid(weight: Tensor, scale: Tensor, zero: Tensor | int | None, scheme: Scheme) -> Canonical:
    """Return the canonical tensors of a weight that was rounded elsewhere.

    Args:
        weight: [N, K], (code - zero) * scale up to the rounding of its dtype.
        scale: N * G values, in the order of [N, G]; negative ones are fine.
        zero: likewise, or one for all; None: the symmetric format's own.
        scheme: its layout says bits and groups.

    Raises:
        ValueError: sizes do not fit the layout, a zero point is none of its codes, or a weight is on no code.
    """
    layout = scheme.layout
    n, k = weight.shape
    sizes, levels = layout.geometry(k), layout.format.levels
    if scale.numel() != n * sizes.groups:
        raise ValueError(f"the scales have {scale.numel()} values; expected {n} x {sizes.groups} for {layout}")
    scale = scale.reshape(n, sizes.groups)
    center = torch.as_tensor(layout.format.zero if zero is None else zero).float()
    if center.numel() not in (1, n * sizes.groups):
        raise ValueError(f"the zero points have {center.numel()} values; expected 1 or {n} x {sizes.groups}")
    zeros = center.reshape(-1).expand(n * sizes.groups).reshape(n, sizes.groups)
    whole = bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros <= levels)).all())
    if not whole or (not layout.asymmetric and bool((zeros != layout.format.zero).any())):
        raise ValueError(f"the zero points go from {float(zeros.min())} to {float(zeros.max())}; not those of {layout}")
    spread = [t.float().repeat_interleave(sizes.group, 1)[:, :k] for t in (scale, zeros)]
    steps = torch.where(spread[0] == 0, 0.0, weight.float() / spread[0])
    codes = (steps.round() + spread[1]).clamp(0, levels)
    off = float((codes - spread[1] - steps).abs().max()) if codes.numel() else 0.0
    if not off <= _OFF:
        raise ValueError(f"a weight lies {off:.2f} steps off the grid of {layout}")
    stored = zeros.to(torch.uint8).contiguous() if layout.asymmetric else None
    return Canonical(join_codes(codes.to(torch.uint8), layout.format.bits), scale.to(layout.scale_dtype), stored)


def _settings(layout: Layout) -> dict[str, Any]:
    return {"bits": layout.format.bits, "group_size": layout.group_size, "sym": not layout.asymmetric}


def autoround(
    model: Any, schemes: Mapping[str, Scheme], config: WeightOnlyQuantConfig, samples: Samples, tokenizer: Any
) -> dict[str, Canonical]:
    """Tune a copy of the model and return its linears' tensors by full name; the given model is not changed.

    Args:
        model: floating point.
        schemes: the linears to quantize.
        config: the samples' length and the seed.
        samples: calibration tokens.
        tokenizer: of the model, or None.

    Raises:
        ValueError: the package is missing or leaves something that is not on its grid.
    """
    tool = package().AutoRound
    work = copy.deepcopy(model)
    layout = next(iter(schemes.values())).layout
    others = [n for n, m in work.named_modules() if isinstance(m, nn.Linear) and n not in schemes]
    with torch.enable_grad():
        tuner = tool(
            work,
            tokenizer if tokenizer is not None else object(),  # the samples are tokens already, but None is refused
            **_settings(layout),
            nsamples=len(samples.tokens),
            seqlen=min(t.shape[1] for t in samples.tokens),
            dataset=samples.tokens,
            seed=config.seed,
            layer_config={
                **{name: {"bits": 16} for name in others},
                **{name: _settings(s.layout) for name, s in schemes.items() if s.layout != layout},
            },
            quant_lm_head=False,
            enable_torch_compile=False,
            device_map="cpu",
        )
        tuned = tuner.quantize()
    work = tuned[0] if isinstance(tuned, tuple) else work
    result = {}
    for name, scheme in schemes.items():
        linear = work.get_submodule(name)
        scale = getattr(linear, "scale", None)
        if not isinstance(scale, Tensor):
            continue
        try:
            result[name] = on_grid(linear.weight.detach(), scale, getattr(linear, "zp", None), scheme)
        except ValueError as error:
            raise ValueError(f"auto-round's {name}: {error}") from None
    if not result:
        raise ValueError(
            "auto-round quantized none of the linears: it takes in and out features that are multiples of 32"
        )
    return result
