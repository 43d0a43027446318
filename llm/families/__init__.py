"""The only place where models have names: which seams apply to a family, one row of data each (`rows.FAMILIES`)."""

from .family import Family, Gated, GatedFused, Plain
from .rows import FAMILIES, find_family

__all__ = ["FAMILIES", "Family", "Gated", "GatedFused", "Plain", "find_family"]
