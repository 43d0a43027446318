"""Every test of this folder runs once per ISA tier that the machine has."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrt import _C

sys.path.insert(0, str(Path(__file__).parent))  # `from test_dynamic_shapes import ...` in the tests of this folder
START = _C.cpu_isa()


@pytest.fixture(
    params=[t for t in _C.cpu_isas().split(", ") if t != "reference"] if START != "reference" else ["reference"]
)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test under one tier and return to the first one afterwards."""
    if request.param != "reference":
        _C.force_cpu_isa(request.param)
    yield request.param
    if request.param != "reference":
        _C.force_cpu_isa(START)


@pytest.fixture
def kernel_isa(isa: str) -> str:
    """As `isa`, for what kernels promise beyond their reference in float32: it keeps no wider range and no exact order."""
    if isa == "reference":
        pytest.skip("a promise of the kernels")
    return isa
