"""Every SYCL kernel on SYCL's CPU device against the reference in float64, on the same samples as the CPU's kernels."""

import pytest
import torch
from sample_checks import check_samples

from llmrt.xpu.route import ROUTES, import_routes
from llmrt.xpu.sycl.toolchain import missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
import_routes()
OPERATORS = sorted(operator for operator, kind in ROUTES if kind == "sycl")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_equals_reference_in_double(name: str, dtype: torch.dtype) -> None:
    assert not check_samples(name, "sycl", dtype)
