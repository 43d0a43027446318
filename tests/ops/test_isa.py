"""The choice of the ISA tier at start, in processes of their own."""

import os
import subprocess
import sys

import pytest

from llmrt import _C

PROGRAM = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import llmrt
import torch
from llmrt import _C, ops
y = ops.rms_norm(torch.ones(2, 8), torch.ones(8), 0.0)
assert torch.equal(y, torch.ones(2, 8))
print(_C.cpu_isa(), sum("references" in str(w.message) for w in caught))
"""


def start(isa: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "LLMRT_CPU_ISA"}
    if isa is not None:
        environment["LLMRT_CPU_ISA"] = isa
    return subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)


def test_every_supported_tier_can_be_forced() -> None:
    for name in _C.cpu_isas().split(", "):
        done = start(name)
        assert done.stdout.split() == [name, "1" if name == "reference" else "0"], done.stderr


def test_default_is_the_best_tier() -> None:
    assert start(None).stdout.split()[0] == _C.cpu_isas().split(", ")[0]


def test_unknown_tier_is_refused_with_the_valid_ones() -> None:
    done = start("avx9")
    assert done.returncode != 0
    assert f"LLMRT_CPU_ISA=avx9; valid here: {_C.cpu_isas()}" in done.stderr


def test_switching_at_run_time_refuses_unknown_tiers() -> None:
    with pytest.raises(ValueError, match="cannot switch to ISA tier 'sse'"):
        _C.force_cpu_isa("sse")
