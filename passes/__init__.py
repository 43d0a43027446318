"""What happens to a captured graph: canonical form, rewrites to llmrt's operators, and the compile backend."""

from .backend import llmrt_backend
from .order import REWRITES, RewriteError, rewrite
from .retrace import retrace
from .rewrite import GraphRewrite, Rewrite, RewriteReport

__all__ = [
    "REWRITES",
    "GraphRewrite",
    "Rewrite",
    "RewriteError",
    "RewriteReport",
    "llmrt_backend",
    "retrace",
    "rewrite",
]
