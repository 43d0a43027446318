"""The meaning of every operator: schema, fake kernel, reference and sample inputs, in plain torch."""

from .attention import attention
from .formats import FORMATS, Layout, dequantize, interleave_gate_up, quantize
from .linear import pack_weight, quant_linear, unpack_weight
from .norm import rms_norm
from .operator import OPERATORS, Operator

__all__ = [
    "FORMATS",
    "OPERATORS",
    "Layout",
    "Operator",
    "attention",
    "dequantize",
    "interleave_gate_up",
    "pack_weight",
    "quant_linear",
    "quantize",
    "rms_norm",
    "unpack_weight",
]
