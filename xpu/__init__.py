"""Kernels of the operators for Intel GPUs: SYCL and Triton, and the table that says which of them serves which call.

``llmrt.devices.load("xpu")`` imports this room and registers its kernels; a machine without such a device never does.
"""

from .dispatch import Fallback, Installed, fallbacks, install, missing
from .route import ROUTES, Route
from .table import TABLE, Row, choose

__all__ = ["ROUTES", "TABLE", "Fallback", "Installed", "Route", "Row", "choose", "fallbacks", "install", "missing"]
