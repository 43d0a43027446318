"""SYCL kernels, compiled at run time by the compiler that the package intel-sycl-rt brings."""
