"""Every SYCL kernel on SYCL's CPU device against the reference in float64, on the same samples as the CPU's kernels."""

import pytest
import torch
from sample_checks import check_samples

from llmrt.ops import OPERATORS
from llmrt.xpu.route import ROUTES, import_routes
from llmrt.xpu.sycl import attention
from llmrt.xpu.sycl.toolchain import missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
import_routes()
NAMES = sorted(operator for operator, kind in ROUTES if kind == "sycl")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Attention has a program for each dtype of activations and of the cache, head dimension and number of query rows, which takes
#: seconds to compile. These run here, with ATTENTION_ROWS; everything else takes the program that serves any cache.
ATTENTION = {
    (torch.bfloat16, torch.bfloat16, 256),
    (torch.bfloat16, torch.int8, 64),
    (torch.float16, torch.float16, 80),
}
ATTENTION_ROWS = (4,)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(attention, "has_program", lambda *kinds: kinds in ATTENTION)
    monkeypatch.setattr(attention, "ROWS", ATTENTION_ROWS)
    return monkeypatch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equals_reference_in_double(name: str, dtype: torch.dtype, programs: pytest.MonkeyPatch) -> None:
    assert not check_samples(name, "sycl", dtype)


@pytest.mark.parametrize("rows", [1, 8])
def test_attention_with_few_and_many_rows(rows: int, programs: pytest.MonkeyPatch) -> None:
    kinds = (torch.bfloat16, torch.float16, 128)
    programs.setattr(attention, "has_program", lambda *asked: asked == kinds)
    programs.setattr(attention, "ROWS", (rows,))
    found = [s for s in OPERATORS["attention"].sample_inputs(kinds[0]) if s.args[1].dtype == kinds[1]]
    found = [s for s in found if s.args[0].shape[-1] == kinds[2]]
    assert len(found) >= 4
    assert not check_samples("attention", "sycl", kinds[0], found)
