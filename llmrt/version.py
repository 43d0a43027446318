"""The version, for those who want nothing else."""

__version__ = "0.1.0"
