"""The demo model: a small Llama trained on CPython's standard library, part of the package so that nothing needs a network."""

from pathlib import Path

from .corpus import held_out_files, library_files

__all__ = ["demo_model_path", "held_out_files", "library_files"]


def demo_model_path() -> Path:
    """Return the directory of the demo model (config, bf16 safetensors, tokenizer): give it to ``from_pretrained``."""
    return Path(__file__).resolve().parent / "tiny-python"
