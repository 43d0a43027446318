"""argmax: bad arguments are named; it is torch's argmax in float32, on rows long enough for several threads too."""

import pytest
import torch

from llmrt import ops

BAD = {
    "empty rows": (torch.randn(3, 0), r"x has shape \[3, 0\]; expected at least one element per row"),
    "scalar": (torch.tensor(1.0), r"x has shape \[\]; expected at least one element per row"),
    "integers": (torch.arange(3), "x has dtype int64; valid: float32, bfloat16, float16"),
}


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str, which: str, isa: str) -> None:
    x, message = BAD[case]
    with pytest.raises(RuntimeError, match=message):
        (ops.argmax if which == "kernel" else ops.argmax.reference)(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_first_largest_logit(rows: int, dtype: torch.dtype, isa: str) -> None:
    logits = (3 * torch.randn(rows, 2, 128256 if rows == 1 else 33000)).clamp(max=9).to(dtype)[:, -1]
    assert (logits == 9).sum(-1).min() > 1, "the first of several is asked for"
    assert torch.equal(ops.argmax(logits), logits.float().argmax(-1))
