"""What `optimize` is told about static INT8."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...ops.formats import Layout
from ..quantization import KnownFields, WeightOnlyQuantConfig

STATIC_METHOD = "llmrt-static"
#: Dtypes of the weights' scales.
SCALES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def weight_layout(scale_dtype: str) -> Layout:
    """Return the layout of a weight: one scale per output, symmetric."""
    return Layout("int8", False, -1, SCALES[scale_dtype])


@dataclass
class StaticQuantConfig(KnownFields):
    """Static INT8 (W8A8): int8 weights, one scale per output; uint8 activations, one scale and zero point per layer from calibration.

    Before rounding, input channel j of a layer is multiplied by wmax_j^(1 - alpha) / xmax_j^alpha, its column of the weight by
    the inverse, where xmax and wmax are the largest magnitudes that calibration saw and that the weights have (SmoothQuant).

    Args:
        alpha: 0.0 to 1.0; "auto": per layer, the one of 21 with the least error of the layer's product over kept rows of the
            calibration.
        scale_dtype: of the weights' scales: "fp32", "bf16" or "fp16".
        lm_head: whether the output head becomes INT8 too; False: it stays floating point.
        modules_to_not_convert: names, parts of names ("q_proj", "layers.0") or patterns ("*.mlp.*") of linears that stay as they
            are.
        calibration_rows: rows of input that are kept per layer for alpha "auto", drawn evenly from all that calibration sees.
        floating_modules: full names of the linears that a saved model keeps floating point; written at saving.
        scale_dtypes: by full name, the scale_dtype of linears with another one; written at saving.
        quant_method: "llmrt-static", how transformers finds the reader.

    Raises:
        ValueError: a value is outside these; the message lists those that exist.
    """

    alpha: float | str = 0.5
    scale_dtype: str = "fp32"
    lm_head: bool = True
    modules_to_not_convert: list[str] | None = None
    calibration_rows: int = 128
    floating_modules: list[str] | None = None
    scale_dtypes: dict[str, str] | None = None
    quant_method: str = STATIC_METHOD

    def __post_init__(self) -> None:
        """Check every value."""
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool) and 0 <= self.alpha <= 1
        if not number and self.alpha != "auto":
            raise ValueError(f"alpha is {self.alpha!r}; valid: 0.0 to 1.0 or 'auto'")
        if not isinstance(self.scale_dtype, str) or self.scale_dtype not in SCALES:
            raise ValueError(f"scale_dtype is {self.scale_dtype!r}; valid: {', '.join(map(repr, SCALES))}")
        if not isinstance(self.lm_head, bool):
            raise ValueError(f"lm_head is {self.lm_head!r}; valid: True, False")
        rows = self.calibration_rows
        if not isinstance(rows, int) or isinstance(rows, bool) or not 1 <= rows <= 1 << 20:
            raise ValueError(f"calibration_rows is {rows!r}; valid: 1 to {1 << 20}")
        if self.quant_method != STATIC_METHOD:
            raise ValueError(f"quant_method is {self.quant_method!r}; valid: {STATIC_METHOD!r}")
        if isinstance(self.modules_to_not_convert, str):
            self.modules_to_not_convert = [self.modules_to_not_convert]
        for name in ("modules_to_not_convert", "floating_modules"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)):
                raise ValueError(f"{name} is {value!r}; valid: a list of names, or None")

        dtypes = self.scale_dtypes or {}
        if not isinstance(dtypes, dict) or not all(isinstance(k, str) and v in list(SCALES) for k, v in dtypes.items()):
            raise ValueError(
                f"scale_dtypes is {dtypes!r}; valid: names of linears with {', '.join(map(repr, SCALES))}, or None"
            )

    def layout(self, name: str) -> Layout:
        """Return the layout of a linear's weight."""
        return weight_layout((self.scale_dtypes or {}).get(name, self.scale_dtype))

    def excluded_by(self, name: str) -> str | None:
        """Return the entry of modules_to_not_convert that matches a module's full name, or None."""
        return WeightOnlyQuantConfig(
            modules_to_not_convert=self.modules_to_not_convert, floating_modules=self.floating_modules
        ).excluded_by(name)

    def to_dict(self) -> dict[str, Any]:
        """Return what a config.json holds; `StaticQuantConfig(**d)` gives the same configuration back."""
        return asdict(self)
