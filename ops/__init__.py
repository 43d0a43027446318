"""The meaning of every operator: schema, fake kernel, reference and sample inputs, in plain torch."""

from .attention import attention
from .kv_append import kv_append
from .norm import rms_norm
from .operator import OPERATORS, Operator

__all__ = ["OPERATORS", "Operator", "attention", "kv_append", "rms_norm"]
