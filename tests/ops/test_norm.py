"""Bad arguments of the norms are named in the error."""

import pytest
import torch

from llmrt import ops


def test_wrong_weight_shape_is_named(isa: str) -> None:
    with pytest.raises(RuntimeError, match=r"weight has shape \[7\]; expected \[8\]"):
        ops.rms_norm(torch.randn(2, 8), torch.randn(7), 1e-5)


def test_integer_input_is_named(isa: str) -> None:
    with pytest.raises(RuntimeError, match="x has dtype int64"):
        ops.rms_norm(torch.ones(2, 8, dtype=torch.long), torch.randn(8), 1e-5)


def test_nan_stays(isa: str) -> None:
    x = torch.randn(2, 40)
    x[0, 3] = float("nan")
    y = ops.rms_norm(x, torch.ones(40), 1e-5)
    assert y[0].isnan().all() and not y[1].isnan().any()
