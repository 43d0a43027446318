"""The probes of the machine's limits give figures under every tier, and say which arguments are valid."""

import threading

import pytest

from llmrt import _C


@pytest.mark.parametrize("kind", ["int8", "fp32", "bf16"])
def test_compute_rates_are_positive_where_the_instruction_exists(kind: str, isa: str) -> None:
    missing = isa == "reference" or (kind == "bf16" and isa not in ("avx512_bf16", "amx"))
    rate = _C.measure_peak(kind, 1, 0.01)
    assert rate == 0 if missing else rate > 0


def test_read_rate_is_positive(isa: str) -> None:
    rate = _C.measure_peak(kind="read", threads=1, seconds=1e-3)
    assert rate == 0 if isa == "reference" else rate > 0


def test_other_threads_run_meanwhile() -> None:
    measurement = threading.Thread(target=_C.measure_peak, args=("fp32", 1, 0.3))
    measurement.start()
    rounds = 0
    while measurement.is_alive():
        rounds += 1
    assert rounds > 1 or _C.cpu_isa() == "reference"


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="kind is 'int4'; valid: int8, bf16, fp32, read"):
        _C.measure_peak("int4", 1, 0.01)
    for threads in (0, -1, 10**6):
        with pytest.raises(ValueError, match=f"threads is {threads}; valid: 1 to "):
            _C.measure_peak("fp32", threads, 0.01)
    for seconds in (0.0, -1.0, 61.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"seconds is .*; valid: above 0, at most 60"):
            _C.measure_peak("read", 1, seconds)
    with pytest.raises(TypeError):
        _C.measure_peak(1, 1, 0.01)  # type: ignore[arg-type]
