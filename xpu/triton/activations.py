"""Functions that Triton's language lacks, for use in kernels."""

import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def"


@triton.jit
def tanh(x):
    """1 - 2 / (e^2x + 1): accurate to 1e-7 absolutely, and it needs no library of a vendor."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu(x):
    """x / 2 * (1 + erf(x / sqrt(2)))."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    """x / 2 * (1 + tanh(u)) = x * sigmoid(2 * u) with u = sqrt(2 / pi) * (x + 0.044715 * x^3)."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation of an epilogue's name, that of the gate for the gated ones; the others leave x as it is."""
    if NAME == "relu":
        x = tl.where(x < 0.0, 0.0, x)  # NaN stays
    if NAME == "silu" or NAME == "silu_mul":
        x = silu(x)
    if NAME == "gelu" or NAME == "gelu_mul":
        x = gelu(x)
    if NAME == "gelu_tanh" or NAME == "gelu_tanh_mul":
        x = gelu_tanh(x)
    return x


@triton.jit
def round_even(x):
    """The nearest integer of |x| < 2^22, ties to even, by an addition that has no bits for the fraction.

    A compiler that fused it with the multiplication before it would round once instead of twice: launch with enable_fp_fusion=False.
    """
    return (x + 12582912.0) - 12582912.0
