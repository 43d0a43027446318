"""Intel's offline compiler takes every SYCL kernel for Arc and Data Center GPU Max, and none of them spills registers."""

import pytest
import torch

from llmrt.ops.formats import FORMATS
from llmrt.xpu.sycl import attention, linear, linear_pack, offline, toolchain
from llmrt.xpu.sycl.pointwise import pointwise

LACK = toolchain.missing() or offline.missing()
#: Formats whose codes differ: the linear's programs.
CODINGS = ("int4", "int8", "nf4", "fp8_e4m3", "fp8_e5m2")
BUNDLES = (
    linear_pack.BUNDLE,
    pointwise(torch.bfloat16),
    pointwise(torch.float32),
    *(linear.bundle(FORMATS[name], int8) for name in CODINGS for int8 in {"int8" in FORMATS[name].computes, False}),
    attention.bundle(torch.bfloat16, attention.ANY_ROWS),
    *(attention.bundle(torch.bfloat16, rows, torch.bfloat16, 64) for rows in attention.ROWS),
    *(attention.bundle(torch.bfloat16, rows, torch.int8, 128) for rows in (1, 4)),
    attention.bundle(torch.float16, 8, torch.float16, 128),
)  # fmt: skip


@pytest.mark.skipif(LACK is not None, reason=str(LACK))
def test_every_kernel_compiles_for_arc_and_max_without_spilling() -> None:
    found = list(offline.survey(BUNDLES))
    assert {(f.bundle, f.kernel, f.device) for f in found} == {
        (str(bundle), kernel, device) for bundle in BUNDLES for kernel in bundle.kernels for device in offline.DEVICES
    }
    assert not [f for f in found if f.spilled or f.private]
    assert all(f.simd in (16, 32) and f.registers == 128 for f in found)


def test_ze_info_of_something_else() -> None:
    for binary in (b"", b"\x7fELF\x02" + bytes(59), b"\x7fELF\x01" + bytes(100)):
        with pytest.raises(ValueError, match=r"no section \.ze_info"):
            offline.ze_info(binary)
