"""An operator beside its reference in float64: what the tests of the CPU's kernels and of the GPU's share."""

import torch

from llmrt.ops import Operator
from llmrt.ops.operator import Sample

#: The result in double rounded to the output's dtype: one rounding of difference, plus float32 arithmetic.
RTOL = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def on(device: str, sample: Sample) -> Sample:
    """Return the sample with its tensors copied to a device, strides included."""

    def move(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(0, dtype=t.dtype, device=device).set_(
            t.untyped_storage().to(device=device).clone(), t.storage_offset(), t.shape, t.stride()
        )

    return sample.map(move)


def run(call, sample: Sample) -> list[torch.Tensor]:
    """Return the outputs of a call, then the arguments it may have mutated."""
    out = call(*sample.args, **sample.kwargs)
    return [t for t in (out if isinstance(out, tuple | list) else (out,)) if t is not None] + [
        a for a in (*sample.args, *sample.kwargs.values()) if isinstance(a, torch.Tensor)
    ]


def compare_with_double(op: Operator, sample: Sample, device: str = "cpu") -> None:
    """Compare an operator's outputs, and the arguments it may mutate, with those of its reference in float64."""
    expected = run(op.reference, sample.clone() if op.exact else sample.clone().double())
    actual = run(op, sample.clone() if device == "cpu" else on(device, sample))
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        rtol = RTOL.get(a.dtype, 0)
        torch.testing.assert_close(
            a.cpu().double() if a.is_floating_point() else a.cpu(),
            e.double() if e.is_floating_point() else e,
            rtol=rtol,
            atol=rtol,
            equal_nan=True,
            msg=lambda m: f"{sample.name}: {m}",
        )
