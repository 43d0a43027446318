"""Static INT8: 8-bit weights and 8-bit activations whose scales come from calibration (SmoothQuant, Xiao et al. 2022)."""
