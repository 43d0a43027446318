"""What holds for every operator: equals its reference in float64 on every sample, dtype and ISA tier; passes opcheck."""

import pytest
import torch

from llmrt.ops import OPERATORS, Operator
from llmrt.ops.operator import Sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [pytest.param(op, dtype, id=f"{name}-{str(dtype)[6:]}") for name, op in OPERATORS.items() for dtype in DTYPES]


def run(call, sample: Sample) -> list[torch.Tensor]:
    """Return the outputs of a call, then the arguments it may have mutated."""
    out = call(*sample.args, **sample.kwargs)
    return [t for t in (out if isinstance(out, tuple | list) else (out,)) if t is not None] + [
        a for a in (*sample.args, *sample.kwargs.values()) if isinstance(a, torch.Tensor)
    ]


def compare_with_double(op: Operator, sample: Sample) -> None:
    """Compare an operator's outputs, and the arguments it may mutate, with those of its reference in float64."""
    expected = run(op.reference, sample.clone() if op.exact else sample.clone().double())
    actual = run(op, sample.clone())
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        # The result in double rounded to the output's dtype: one rounding of difference, plus float32 arithmetic.
        rtol = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(a.dtype, 0)
        torch.testing.assert_close(
            a.double() if a.is_floating_point() else a,
            e.double() if e.is_floating_point() else e,
            rtol=rtol,
            atol=rtol,
            equal_nan=True,
            msg=lambda m: f"{sample.name}: {m}",
        )


@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_equals_reference_in_double(op: Operator, dtype: torch.dtype, isa: str) -> None:
    for sample in op.sample_inputs(dtype):
        compare_with_double(op, sample)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, isa: str) -> None:
    op = OPERATORS[name]
    for sample in op.sample_inputs(torch.float32)[:6]:
        torch.library.opcheck(op.overload, sample.clone().args, sample.clone().kwargs)
