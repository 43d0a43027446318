"""What holds for every operator: equals its reference in float64 on every sample, dtype and ISA tier; passes opcheck."""

import pytest
import torch
from comparing import compare_with_double

from llmrt import _C
from llmrt.ops import OPERATORS, Operator

START = _C.cpu_isa()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [pytest.param(op, dtype, id=f"{name}-{str(dtype)[6:]}") for name, op in OPERATORS.items() for dtype in DTYPES]


@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_equals_reference_in_double(op: Operator, dtype: torch.dtype, isa: str) -> None:
    for sample in op.sample_inputs(dtype):
        compare_with_double(op, sample)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, isa: str) -> None:
    op, kernels_alone = OPERATORS[name], isa != START
    for sample in op.sample_inputs(torch.float32)[:6]:
        # What it writes and returns is the kernels' doing; what fakes, gradients and tracing do is the same on every tier.
        checks = {"test_utils": "test_schema"} if kernels_alone else {}
        torch.library.opcheck(op.overload, sample.clone().args, sample.clone().kwargs, **checks)
