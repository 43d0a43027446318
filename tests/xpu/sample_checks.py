"""Runs an operator's samples through the kernels of one kind and compares with the reference in float64."""

from collections import Counter

import torch

from llmrt.ops import OPERATORS, Operator
from llmrt.ops.operator import Sample
from llmrt.xpu import install

RTOL = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def outputs(call, sample: Sample) -> list[torch.Tensor]:
    """Return the outputs of a call, then the arguments it may have mutated."""
    out = call(*sample.args, **sample.kwargs)
    return [t for t in (out if isinstance(out, tuple | list) else (out,)) if t is not None] + [
        a for a in (*sample.args, *sample.kwargs.values()) if isinstance(a, torch.Tensor)
    ]


def compare(op: Operator, sample: Sample) -> None:
    expected = outputs(op.reference, sample.clone() if op.exact else sample.clone().double())
    actual = outputs(op, sample.clone())
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        rtol = RTOL.get(a.dtype, 0)
        torch.testing.assert_close(
            a.double() if a.is_floating_point() else a,
            e.double() if e.is_floating_point() else e,
            rtol=rtol,
            atol=rtol,
            equal_nan=True,
            msg=lambda m: f"{sample.name}: {m}",
        )


def check_samples(name: str, kind: str, dtype: torch.dtype, samples: list[Sample] | None = None) -> Counter[str]:
    """Compare every sample; return how often each reason for a refusal was given."""
    op, refused = OPERATORS[name], Counter()
    with install("cpu", kind, strict=True) as kernels:
        for sample in op.sample_inputs(dtype) if samples is None else samples:
            try:
                compare(op, sample)
            except RuntimeError as error:
                if "no kernel of" not in str(error):
                    raise
                refused[str(error).rpartition("this call: ")[2]] += 1
        ran = {route for operator, route in kernels.calls if operator == name} - {"reference"}
        assert ran <= {kind}
    return refused
