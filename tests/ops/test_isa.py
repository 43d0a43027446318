"""The choice of the ISA tier at start, in processes of their own."""

import subprocess
import sys
from dataclasses import dataclass

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


#: argv: a folder, then values of the variable, "-" for none. A process for each, forked where torch is imported and llmrt is not.
FORKS = f"""
import os, sys, traceback
import torch
folder, *values = sys.argv[1:]
for value in values:
    if (child := os.fork()) == 0:
        for stream, suffix in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{{folder}}/{{value}}.{{suffix}}", os.O_WRONLY | os.O_CREAT), stream)
        os.environ.pop("LLMRT_CPU_ISA", None)
        if value != "-":
            os.environ["LLMRT_CPU_ISA"] = value
        try:
            exec({PROGRAM!r})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    print(value, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Started:
    """How a process with the variable LLMRT_CPU_ISA ended, and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Started]:
    """A process for every tier, for one that nobody knows, and ("-") for none."""
    folder, values = tmp_path_factory.mktemp("tiers"), [*_C.compiled_cpu_isas().split(", "), "avx9", "-"]
    command = [sys.executable, "-c", FORKS, str(folder), *values]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ended = dict(line.split() for line in printed.splitlines())
    assert list(ended) == values
    return {v: Started(int(ended[v]), *((folder / f"{v}.{s}").read_text() for s in ("out", "err"))) for v in values}


def test_every_supported_tier_can_be_forced(started: dict[str, Started]) -> None:
    for name in _C.cpu_isas().split(", "):
        assert started[name].status == 0, started[name].err
        assert started[name].out.split() == [name, "1" if name == "reference" else "0"]


def test_default_is_the_best_tier(started: dict[str, Started]) -> None:
    assert started["-"].status == 0 and started["-"].out.split()[0] == _C.cpu_isas().split(", ")[0]


def test_unknown_tier_is_refused_with_the_valid_ones(started: dict[str, Started]) -> None:
    assert started["avx9"].status != 0
    assert f"LLMRT_CPU_ISA=avx9; valid here: {_C.cpu_isas()}" in started["avx9"].err


def test_tier_that_this_cpu_lacks_is_refused(started: dict[str, Started]) -> None:
    compiled, here = _C.compiled_cpu_isas().split(", "), _C.cpu_isas()
    assert compiled == ["amx", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx2", "reference"]
    for name in set(compiled) - set(here.split(", ")):
        assert started[name].status != 0
        assert f"LLMRT_CPU_ISA={name}, which this CPU or system lacks; valid here: {here}" in started[name].err
        with pytest.raises(ValueError, match=f"cannot switch to ISA tier '{name}'; valid here: {here}"):
            _C.force_cpu_isa(name)


def test_switching_at_run_time_refuses_unknown_tiers() -> None:
    with pytest.raises(ValueError, match="cannot switch to ISA tier 'sse'"):
        _C.force_cpu_isa("sse")


#: feature -> register and bit, from Intel's manual, volume 2A, CPUID; register state: XCR0, volume 1, chapter 13.
FEATURES = {
    "fma": ("leaf1_ecx", 12),
    "osxsave": ("leaf1_ecx", 27),
    "f16c": ("leaf1_ecx", 29),
    "avx2": ("leaf7_ebx", 5),
    "avx512f": ("leaf7_ebx", 16),
    "avx512dq": ("leaf7_ebx", 17),
    "avx512bw": ("leaf7_ebx", 30),
    "avx512vl": ("leaf7_ebx", 31),
    "avx512_vnni": ("leaf7_ecx", 11),
    "amx_bf16": ("leaf7_edx", 22),
    "amx_tile": ("leaf7_edx", 24),
    "amx_int8": ("leaf7_edx", 25),
    "avx_vnni": ("leaf7_1_eax", 4),
    "avx512_bf16": ("leaf7_1_eax", 5),
    "xmm_state": ("xcr0", 1),
    "ymm_state": ("xcr0", 2),
    "mask_state": ("xcr0", 5),
    "zmm_low_state": ("xcr0", 6),
    "zmm_high_state": ("xcr0", 7),
    "tile_configuration_state": ("xcr0", 17),
    "tile_data_state": ("xcr0", 18),
}
YMM = {"osxsave", "xmm_state", "ymm_state"}
ZMM = YMM | {"mask_state", "zmm_low_state", "zmm_high_state"}
TILES = ZMM | {"tile_configuration_state", "tile_data_state"}
HASWELL = {"fma", "f16c", "avx2"}
ALDER_LAKE = HASWELL | {"avx_vnni"}
SKYLAKE_X = HASWELL | {"avx512f", "avx512dq", "avx512bw", "avx512vl"}
CASCADE_LAKE = SKYLAKE_X | {"avx512_vnni"}
ZEN_4 = COOPER_LAKE = CASCADE_LAKE | {"avx512_bf16"}
ZEN_5 = ZEN_4 | {"avx_vnni"}
SAPPHIRE_RAPIDS = ZEN_5 | {"amx_tile", "amx_int8", "amx_bf16"}
BELOW_AMX = "avx512_bf16, avx512_vnni, avx_vnni, avx2, reference"


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        pytest.param({"fma", "f16c"} | YMM, "reference", id="before AVX2"),
        pytest.param(HASWELL | YMM, "avx2, reference", id="Haswell"),
        pytest.param(HASWELL, "reference", id="Haswell, ymm registers are not saved"),
        pytest.param(HASWELL - {"fma"} | YMM, "reference", id="AVX2 without FMA"),
        pytest.param(ALDER_LAKE | YMM, "avx_vnni, avx2, reference", id="Alder Lake"),
        pytest.param(SKYLAKE_X | ZMM, "avx2, reference", id="Skylake-X"),
        pytest.param(CASCADE_LAKE | ZMM, "avx512_vnni, avx2, reference", id="Cascade Lake"),
        pytest.param(CASCADE_LAKE | YMM, "avx2, reference", id="Cascade Lake, zmm registers are not saved"),
        pytest.param(ZEN_4 | ZMM, "avx512_bf16, avx512_vnni, avx2, reference", id="Zen 4, Cooper Lake"),
        pytest.param(ZEN_5 | ZMM, "avx512_bf16, avx512_vnni, avx_vnni, avx2, reference", id="Zen 5"),
        pytest.param(ZEN_5 | YMM, "avx_vnni, avx2, reference", id="Zen 5, zmm registers are not saved"),
        pytest.param(SAPPHIRE_RAPIDS | TILES, "amx, " + BELOW_AMX, id="Sapphire Rapids"),
        pytest.param(SAPPHIRE_RAPIDS | ZMM, BELOW_AMX, id="Sapphire Rapids, tile registers are not saved"),
        pytest.param(SAPPHIRE_RAPIDS - {"amx_int8"} | TILES, BELOW_AMX, id="AMX without int8"),
        pytest.param(
            SAPPHIRE_RAPIDS | YMM, "avx_vnni, avx2, reference", id="Sapphire Rapids, only ymm registers are saved"
        ),
        pytest.param(SAPPHIRE_RAPIDS | TILES - {"osxsave"}, "reference", id="registers saved by no system"),
    ],
)
def test_tiers_of_other_cpus(features: set[str], expected: str) -> None:
    words = dict.fromkeys(("leaf1_ecx", "leaf7_ebx", "leaf7_ecx", "leaf7_edx", "leaf7_1_eax", "xcr0"), 0)
    for register, bit in (FEATURES[name] for name in features):
        words[register] |= 1 << bit
    assert _C.cpu_isas_of(**words) == expected
