"""Quantization algorithms that look at a model's inputs: GPTQ, AWQ, AutoRound. Rounding to nearest needs none of this.

`calibrate` computes everything without changing the model, so that an interruption leaves nothing half done; `optimize` then
puts the results in place of the float linears while it packs.
"""

from .calibrate import Calibrated, calibrate

__all__ = ["Calibrated", "calibrate"]
