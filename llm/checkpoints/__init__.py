"""Reading and writing checkpoints. One reader per format; llmrt's own is `native`."""

from .loading import AutoModelForCausalLM
from .native import from_quantized, save_quantized

__all__ = ["AutoModelForCausalLM", "from_quantized", "save_quantized"]
