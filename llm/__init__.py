"""Hugging Face models: `optimize`, quantization, the cache, saving and loading.

This is the only room that knows transformers or the name of a model. Importing it adds entries named "llmrt" to transformers'
attention and quantizer registries and changes nothing else.
"""

from . import attention as _attention

_attention.register()

from .cache import KVCache  # noqa: E402
from .checkpoints import AutoModelForCausalLM, from_quantized, save_quantized  # noqa: E402
from .demo import demo_model_path  # noqa: E402
from .export import CachedModel, export  # noqa: E402
from .linear import QuantLinear  # noqa: E402
from .optimize import optimize  # noqa: E402
from .quantization import WeightOnlyQuantConfig  # noqa: E402
from .report import OptimizationError, OptimizationReport  # noqa: E402

__all__ = [
    "AutoModelForCausalLM",
    "CachedModel",
    "KVCache",
    "OptimizationError",
    "OptimizationReport",
    "QuantLinear",
    "WeightOnlyQuantConfig",
    "demo_model_path",
    "export",
    "from_quantized",
    "optimize",
    "save_quantized",
]
