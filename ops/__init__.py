"""The meaning of every operator: schema, fake kernel, reference and sample inputs, in plain torch."""

from .argmax import argmax
from .attention import attention
from .dense import dense_linear, gated_linear, parallel_linear
from .experts import quant_experts
from .formats import FORMATS, Layout, dequantize, interleave_gate_up, quantize
from .gated import gelu_mul, silu_mul
from .kv_append import kv_append
from .kv_rows import load_rows, stored_width
from .linear import pack_weight, quant_linear, unpack_weight
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .operator import OPERATORS, Operator
from .quantize_weight import quantize_weight
from .rope import rope
from .rope_append import rope_append
from .static_linear import static_linear, weight_sums

__all__ = [
    "FORMATS",
    "OPERATORS",
    "Layout",
    "Operator",
    "add_layer_norm",
    "add_rms_norm",
    "argmax",
    "attention",
    "dense_linear",
    "dequantize",
    "gated_linear",
    "gelu_mul",
    "interleave_gate_up",
    "kv_append",
    "layer_norm",
    "load_rows",
    "pack_weight",
    "parallel_linear",
    "quant_experts",
    "quant_linear",
    "quantize",
    "quantize_weight",
    "rms_norm",
    "rope",
    "rope_append",
    "silu_mul",
    "static_linear",
    "stored_width",
    "unpack_weight",
    "weight_sums",
]
