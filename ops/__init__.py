"""The meaning of every operator: schema, fake kernel, reference and sample inputs, in plain torch."""

from .norm import rms_norm
from .operator import OPERATORS, Operator

__all__ = ["OPERATORS", "Operator", "rms_norm"]
