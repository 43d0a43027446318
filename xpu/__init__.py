"""XPU kernels of the operators (SYCL and Triton): empty until they land; `ops` runs its references on other devices."""
