"""Routes made of torch's operators: each equals its operator's reference in float64, and every operator has a route on every device."""

from types import SimpleNamespace

import pytest
import torch
from comparing import compare_with_double

from llmrt.ops import OPERATORS
from llmrt.xpu.dispatch import DEVICES
from llmrt.xpu.route import ROUTES, import_routes
from llmrt.xpu.table import TABLE, candidates

import_routes()
#: Those of onednn.py call what only XPUs have: see test_onednn.py.
COMPOSED = sorted(
    operator for (operator, kind), found in ROUTES.items() if kind == "torch" and "onednn" not in found.run.__module__
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", COMPOSED)
def test_equals_reference_in_double(name: str, dtype: torch.dtype) -> None:
    """On the CPU, whose kernels serve what a route is composed of."""
    op = OPERATORS[name]

    class Composed(SimpleNamespace):
        def __call__(self, *args, **kwargs):
            return ROUTES[name, "torch"].run(*args, **kwargs)

    composed = Composed(reference=op.reference, exact=op.exact)
    for sample in op.sample_inputs(dtype):
        compare_with_double(composed, sample)


@pytest.mark.parametrize("forced", [None, "sycl", "triton"])
@pytest.mark.parametrize("device", ["xpu", "cuda"])
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_route(name: str, device: str, forced: str | None) -> None:
    """By the table: what this machine lacks does not count. Forced to a kind that lacks an operator, torch's route is taken."""
    kinds = DEVICES[device][1]
    if forced is not None and forced not in kinds:
        return
    listed = [row.kind for row in TABLE if row.operator == name and row.kind in kinds]
    assert listed
    assert forced in (None, *listed) or "torch" in listed


def test_a_forced_kind_that_lacks_an_operator_leaves_torchs_route() -> None:
    kinds = DEVICES["cpu"][1]
    assert [route.kind for _, route in candidates("pack_weight", kinds, "triton")] == ["torch"]
    assert [route.kind for _, route in candidates("quant_experts", kinds, "sycl")] == ["torch"]
    assert "torch" not in {route.kind for _, route in candidates("quant_experts", kinds, "triton")}
