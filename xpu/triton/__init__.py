"""Triton kernels, the same for Intel and NVIDIA GPUs, and for Triton's interpreter on CPU tensors."""
