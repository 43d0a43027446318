"""Reading and writing checkpoints. One reader per format; llmrt's own is `native`."""

from .native import from_quantized, save_quantized

__all__ = ["from_quantized", "save_quantized"]
