"""Reading and writing checkpoints. One reader per format; llmrt's own is `native`."""

from .native import from_quantized, save_quantized
from .static import StaticQuantizer

__all__ = ["StaticQuantizer", "from_quantized", "save_quantized"]
