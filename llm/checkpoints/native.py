"""llmrt's own checkpoint format, through transformers.

A directory as `save_pretrained` writes it: config.json with ``quantization_config: {"quant_method": "llmrt", ...}`` and safetensors
in which a quantized linear `name` has the canonical tensors ``name.qweight``, ``name.scales``, ``name.zeros`` (asymmetric only) and
``name.bias``. The packed weights of a CPU or GPU are made at load. After ``import llmrt.llm`` (transformers has no plugin
mechanism: without it the weights would be skipped with a mere warning) ``AutoModelForCausalLM.from_pretrained`` reads it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from ..linear import CanonicalLinear
from ..optimize import optimize
from ..plan import is_linear
from ..quantization import QUANT_METHOD, WeightOnlyQuantConfig
from ..static.config import STATIC_METHOD

register_quantization_config(QUANT_METHOD)(WeightOnlyQuantConfig)


@register_quantizer(QUANT_METHOD)
class Quantizer(HfQuantizer):
    """What transformers calls while it loads a model with our quantization config."""

    requires_calibration = False
    quantization_config: WeightOnlyQuantConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a device that llmrt has no kernels for."""
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        wrong = [str(d) for d in devices if d is not None and str(d) not in ("cpu", "auto")]
        if wrong:
            raise ValueError(
                f"device_map has {', '.join(wrong)}; an llmrt checkpoint loads on the CPU (device_map='cpu')"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        config = self.quantization_config
        head = model.get_output_embeddings()
        linears = {name: m for name, m in model.named_modules() if is_linear(m)}
        unknown = sorted(set(config.floating_modules or ()) - set(linears))
        if unknown:
            raise ValueError(
                f"quantization_config.floating_modules names no linear of this model: {', '.join(unknown)}"
            )
        for name, linear in linears.items():
            layout = config.head_layout() if linear is head else config.layout()
            if layout is None or name in (config.floating_modules or ()):
                continue
            new = CanonicalLinear(
                linear.in_features, linear.out_features, linear.bias is not None, layout, linear.weight.dtype, "meta"
            )
            new._is_hf_initialized = True  # type: ignore[assignment]
            model.set_submodule(name, new)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _check_loaded(model)
        model.eval()
        return optimize(model, inplace=True, quantization_config=self.quantization_config)

    def is_serializable(self) -> bool:
        """Saving writes canonical tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Quantized weights have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Operators have fake kernels."""
        return True


def _check_loaded(model: nn.Module) -> None:
    """Raise ValueError if the checkpoint lacked a tensor (transformers would go on with what memory held)."""
    for name, module in model.named_modules():
        if not isinstance(module, CanonicalLinear):
            continue
        for part, tensor in (*module._buffers.items(), *module._parameters.items()):
            if tensor is not None and not getattr(tensor, "_is_hf_initialized", False):
                raise ValueError(f"the checkpoint has no {name}.{part}")


def save_quantized(model: Any, directory: str | os.PathLike[str]) -> None:
    """Save a quantized model; the same as its `save_pretrained`.

    Args:
        model: from `optimize` with a quantization_config.
        directory: made if it is not there.

    Raises:
        ValueError: the model is not quantized.
    """
    if not isinstance(getattr(model, "hf_quantizer", None), Quantizer):
        raise ValueError(
            "the model is not quantized by llmrt; call optimize with a quantization_config, or save_pretrained"
        )
    model.save_pretrained(directory)


def from_quantized(directory: str | os.PathLike[str], dtype: torch.dtype | str = "auto") -> Any:
    """Load a model that `save_quantized` or `save_pretrained` wrote: optimized, outputs bit-equal to the saved one's.

    Args:
        directory: with config.json and safetensors.
        dtype: of what is not quantized; "auto": as saved.

    Raises:
        ValueError: the directory holds no llmrt checkpoint, or one whose tensors do not fit.
    """
    path = os.fspath(directory)
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise ValueError(f"{path} has no config.json")
    found = getattr(AutoConfig.from_pretrained(path), "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method not in (QUANT_METHOD, STATIC_METHOD):
        raise ValueError(f"{path} is not an llmrt checkpoint (quant_method is {method!r}); load it and call optimize")
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
