"""What holds for every operator: equals its reference in float64 on every sample, dtype and ISA tier; passes opcheck."""

import pytest
import torch
from comparing import compare_with_double

from llmrt.ops import OPERATORS, Operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [pytest.param(op, dtype, id=f"{name}-{str(dtype)[6:]}") for name, op in OPERATORS.items() for dtype in DTYPES]


@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_equals_reference_in_double(op: Operator, dtype: torch.dtype, isa: str) -> None:
    for sample in op.sample_inputs(dtype):
        compare_with_double(op, sample)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, isa: str) -> None:
    op = OPERATORS[name]
    for sample in op.sample_inputs(torch.float32)[:6]:
        torch.library.opcheck(op.overload, sample.clone().args, sample.clone().kwargs)
