"""The summary of a calibration: a JSON file that people can read and edit, checked when it is read.

::

    {"format": "llmrt static INT8 summary", "version": 1, "layers": [
      {"name": "model.layers.0.self_attn.q_proj", "kind": "linear", "alpha": 0.5, "input_scale": 0.0131, "input_zero": 121,
       "weight_scale_dtype": "fp32", "factors": [1.25, ...]}, ...]}

`factors` multiply the input's channels before rounding (the weight's columns are divided by them) and `input_scale` and
`input_zero` belong to the multiplied input. What is written is what is used; `alpha` says where the factors come from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import SCALES, weight_layout
from .observing import Calibration, Observer, is_observed
from .smoothing import best_alpha, code_range, smoothing_factors, weight_maxima

FORMAT, VERSION = "llmrt static INT8 summary", 1
KINDS = ("linear", "head")
#: What a factor may be: their products with weights stay finite.
FACTORS = (1e-9, 1e9)
_BYTES_PER_NUMBER, _BYTES_PER_LAYER, _BYTES = 64, 4096, 1 << 20  # of a file, generously


class LayerSummary(NamedTuple):
    """One layer.

    Args:
        name: full name of the linear.
        kind: linear or head.
        alpha: that the factors were made with.
        input_scale: of the multiplied activations.
        input_zero: 0 to 255.
        weight_scale_dtype: "fp32", "bf16" or "fp16".
        factors: float32 [K].
    """

    name: str
    kind: str
    alpha: float
    input_scale: float
    input_zero: int
    weight_scale_dtype: str
    factors: Tensor

    def same_input(self, other: LayerSummary) -> bool:
        """Return whether both layers round their input in the same way and have scales of one dtype."""
        return self[3:6] == other[3:6] and torch.equal(self.factors, other.factors)


def save_qconf_summary(
    model: Any, path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> None:
    """Write what the calibration of a model found; see this module for the file.

    The file appears when it is complete: an interruption leaves no part of it.

    Args:
        model: from `optimize` with a `StaticQuantConfig` and no summary file, after samples ran through it.
        path: of the file; one that is there is replaced.
        progress: called after every layer with the number of layers done and their number.

    Raises:
        ValueError: the model is not prepared for calibration, or a layer saw no or no finite input.
    """
    if not is_observed(model):
        raise ValueError("the model is not prepared for calibration; call optimize with a StaticQuantConfig first")
    calibration: Calibration = model.static_calibration
    layers: list[LayerSummary] = []
    names = [name for group in calibration.groups for name in group]
    for together in _same_inputs(model, names):
        layers += _summarize(model, together, calibration)
        if progress is not None:
            progress(len(layers), len(names))
    target = Path(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        part.write_text(_text(layers), encoding="utf-8")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _same_inputs(model: Any, names: list[str]) -> list[list[str]]:
    """Return linears by what they saw: those of one input get common factors, whatever module they belong to."""
    found: dict[Any, list[list[str]]] = {}
    result: list[list[str]] = []
    for name in names:
        observer: Observer = model.get_submodule(name).observer
        near = found.setdefault((observer.seen, float(observer.all.low.sum()), float(observer.all.high.sum())), [])
        together = next((g for g in near if observer.saw_the_same(model.get_submodule(g[0]).observer)), None)
        if together is None:
            near.append(together := [])
            result.append(together)
        together.append(name)
    return result


def _summarize(model: Any, names: list[str], calibration: Calibration) -> list[LayerSummary]:
    """Return the summaries of linears that share their input."""
    config, linears = calibration.config, [model.get_submodule(name) for name in names]
    observer: Observer = linears[0].observer
    seen = observer.range()
    if not observer.seen:
        raise ValueError(
            f"{names[0]} saw no input: run samples through the model first, or put it in modules_to_not_convert"
        )
    if not all(bool(torch.isfinite(t).all()) for t in seen):
        raise ValueError(f"{names[0]} saw NaN or infinite inputs; it cannot be quantized")
    weights = [linear.weight.detach() for linear in linears]
    if config.alpha == "auto":
        assert observer.kept is not None
        alpha = best_alpha(observer.kept, weights, observer.held_out(), weight_layout(config.scale_dtype))
    else:
        alpha = float(config.alpha)
    factors = smoothing_factors(seen, weight_maxima(weights), alpha)
    scale, zero = code_range(seen, factors)
    kinds = ["head" if name == calibration.head else "linear" for name in names]
    return [
        LayerSummary(n, k, alpha, scale, zero, config.scale_dtype, factors) for n, k in zip(names, kinds, strict=True)
    ]


def _short(value: float) -> float:
    return float(f"{value:.9g}")  # nine digits tell all float32 numbers apart


def _text(layers: list[LayerSummary]) -> str:
    lines = []
    for layer in layers:
        fields: dict[str, Any] = {**layer._asdict(), "input_scale": _short(layer.input_scale)}
        factors = json.dumps([_short(f) for f in fields.pop("factors").tolist()])
        lines.append(f'  {json.dumps(fields)[:-1]},\n   "factors": {factors}}}')
    head = json.dumps({"format": FORMAT, "version": VERSION})
    return f'{head[:-1]}, "layers": [\n' + ",\n".join(lines) + "\n]}\n"


def read_qconf_summary(path: str | os.PathLike[str], linears: Mapping[str, nn.Module]) -> dict[str, LayerSummary]:
    """Return the layers of a summary file by name.

    Args:
        path: of the file.
        linears: those that must be in it, by full name.

    Raises:
        ValueError: the file is not a summary of these linears; the message names layer and field.
    """
    try:
        found = _parse(Path(path), sum(_BYTES_PER_LAYER + _BYTES_PER_NUMBER * _inputs(m) for m in linears.values()))
        layers = [_layer(entry, i, linears) for i, entry in enumerate(found)]
        result = {layer.name: layer for layer in layers}
        if len(result) < len(layers):
            names = [layer.name for layer in layers]
            raise ValueError(f"layer {next(n for n in names if names.count(n) > 1)!r} stands there twice")
        missing = [name for name in linears if name not in result]
        if missing:
            raise ValueError(
                f"layers has no {', '.join(missing[:5])}{' ...' * (len(missing) > 5)}: calibrate again, or name what shall "
                "stay floating point in modules_to_not_convert"
            )
    except ValueError as error:
        raise ValueError(f"qconfig_summary_file {os.fspath(path)}: {error}") from None
    return result


def _inputs(linear: nn.Module) -> int:
    features = linear.in_features
    assert isinstance(features, int)
    return features


def _parse(path: Path, most: int) -> list[Any]:
    try:
        size = path.stat().st_size
        if size > most + _BYTES:
            raise ValueError(f"has {size} bytes; a summary of this model has at most {most + _BYTES}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"is no JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'is not a summary: expected an object with "format": "{FORMAT}"')
    version = content.get("version")
    if version != VERSION or isinstance(version, bool):
        raise ValueError(f"version is {_shown(version)}; valid: {VERSION}")
    layers = content.get("layers")
    if not isinstance(layers, list):
        raise ValueError(f"layers is {_shown(layers)}; expected a list")
    return layers


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a number beyond 64 bits"
    return text if len(text) <= 60 else text[:57] + "..."


def _layer(entry: Any, index: int, linears: Mapping[str, nn.Module]) -> LayerSummary:
    if not isinstance(entry, dict):
        raise ValueError(f"layer {index} is {_shown(entry)}; expected an object")
    name = entry.get("name")
    if not isinstance(name, str) or name not in linears:
        raise ValueError(f"layer {index}: name is {_shown(name)}, which is no linear that shall become INT8")
    missing = [field for field in LayerSummary._fields if field not in entry]
    if missing:
        raise ValueError(f"layer {name!r} has no {missing[0]}")
    unknown = [field for field in entry if field not in LayerSummary._fields]
    if unknown:
        raise ValueError(f"layer {name!r} has {_shown(unknown[0])}; valid: {', '.join(LayerSummary._fields)}")
    for field, valid in (("kind", KINDS), ("weight_scale_dtype", tuple(SCALES))):
        if entry[field] not in valid:
            raise ValueError(f"layer {name!r}: {field} is {_shown(entry[field])}; valid: {', '.join(valid)}")
    zero = entry["input_zero"]
    if not isinstance(zero, int) or isinstance(zero, bool) or not 0 <= zero <= 255:
        raise ValueError(f"layer {name!r}: input_zero is {_shown(zero)}; valid: 0 to 255")
    alpha = _number(name, "alpha", entry["alpha"], 0.0, 1.0)
    scale = _number(name, "input_scale", entry["input_scale"], 1e-30, 1e30)
    factors = _factors(name, entry["factors"], _inputs(linears[name]))
    return LayerSummary(
        name, entry["kind"], alpha, float(torch.tensor(scale)), zero, entry["weight_scale_dtype"], factors
    )


def _number(name: str, field: str, value: Any, low: float, high: float) -> float:
    """Return a number of the file as float; NaN, which the JSON parser takes, is in no range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"layer {name!r}: {field} is {_shown(value)}; valid: {low:g} to {high:g}")
    return float(value)


def _factors(name: str, value: Any, in_features: int) -> Tensor:
    if not isinstance(value, list):
        raise ValueError(f"layer {name!r}: factors is {_shown(value)}; expected a list of {in_features} numbers")
    if len(value) != in_features:
        raise ValueError(f"layer {name!r}: factors has {len(value)} numbers; expected {in_features}")
    return torch.tensor([_number(name, f"factors[{j}]", v, *FACTORS) for j, v in enumerate(value)], dtype=torch.float32)
