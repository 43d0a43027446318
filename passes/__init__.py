"""What happens to a captured graph: the compile backend."""

from .backend import llmrt_backend

__all__ = ["llmrt_backend"]
