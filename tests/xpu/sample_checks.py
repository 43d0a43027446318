"""Runs an operator's samples through the kernels of one kind and compares with the reference in float64."""

from collections import Counter

import torch
from comparing import compare_with_double

from llmrt.ops import OPERATORS
from llmrt.ops.operator import Sample
from llmrt.xpu import install


def check_samples(name: str, kind: str, dtype: torch.dtype, samples: list[Sample] | None = None) -> Counter[str]:
    """Compare every sample; return how often each reason for a refusal was given."""
    op, refused = OPERATORS[name], Counter()
    with install("cpu", kind, strict=True) as kernels:
        for sample in op.sample_inputs(dtype) if samples is None else samples:
            try:
                compare_with_double(op, sample)
            except RuntimeError as error:
                if "no kernel of" not in str(error):
                    raise
                refused[str(error).rpartition("this call: ")[2]] += 1
        ran = {route for operator, route in kernels.calls if operator == name} - {"reference"}
        assert ran <= {kind}
    return refused
