"""Static INT8 checkpoints through transformers: ``quantization_config: {"quant_method": "llmrt-static", ...}``.

A quantized linear `name` has the tensors ``name.qweight`` and ``name.scales`` (of the multiplied weight, see ops/formats.py),
``name.input_scale``, ``name.input_zero``, ``name.factors`` and ``name.bias``.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers import register_quantization_config, register_quantizer

from ..static.config import STATIC_METHOD, StaticQuantConfig
from ..static.linear import StoredStaticLinear
from .contents import ModelNames
from .native import Quantizer, check_files
from .stored import linears_of

register_quantization_config(STATIC_METHOD)(StaticQuantConfig)


@register_quantizer(STATIC_METHOD)
class StaticQuantizer(Quantizer):
    """What transformers calls while it loads a model with a `StaticQuantConfig`."""

    requires_calibration = False  # transformers' word for it would hide our message
    quantization_config: StaticQuantConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a model that is not calibrated, or a device that llmrt has no kernels for."""
        if not self.pre_quantized:
            raise ValueError(
                "static INT8 needs a calibration: load the model without quantization_config, then call llm.optimize with it"
            )
        super().validate_environment(*args, device_map=device_map, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        config, head, names = self.quantization_config, model.get_output_embeddings(), ModelNames(model)
        linears = linears_of(model)
        unknown = sorted(set(config.floating_modules or ()) - set(linears))
        if unknown:
            raise ValueError(
                f"quantization_config.floating_modules names no linear of this model: {', '.join(unknown)}"
            )
        for name, linear in linears.items():
            if config.excluded_by(name) is not None or (linear is head and not config.lm_head):
                continue
            new = StoredStaticLinear(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                config.layout(name),
                linear.weight.dtype,
                "meta",
            )
            new._is_hf_initialized = True  # type: ignore[assignment]
            model.set_submodule(name, new)
        check_files(model, names, set(linears), checkpoint_files)
