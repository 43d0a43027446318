"""The operator benchmarks: rows, limits and what runs them all."""

import json
import sys

import pytest
import torch

PEAKS = {"read": 1e10, "int8": 1e12, "bf16": 5e11, "fp32": 2e11}


@pytest.fixture(autouse=True)
def threads():
    """Programs set the number of threads."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.parametrize(
    ("program", "options", "rows"),
    [
        ("bench_linear.py", ["--rows=1,3", "--sizes=64x32", "--layouts=int4_sym_g32_bf16", "--computes=int8,fp32"], 4),
        ("bench_attention.py", ["--cases=1x8,4x8", "--heads=4x2x16"], 2),
        ("bench_norm.py", ["--rows=2", "--sizes=64"], 4),
        ("bench_dense.py", ["--rows=1,40", "--sizes=64x32"], 6),
        ("bench_gated.py", ["--rows=2", "--sizes=64"], 3),
        ("bench_rope.py", ["--tokens=3", "--heads=4x2x16"], 5),
    ],
)
def test_operator_benchmarks(program, options, rows, load, monkeypatch, tmp_path, capsys):
    loaded = load(f"ops/{program}")
    monkeypatch.setattr(sys.modules["harness"], "machine_peaks", lambda: PEAKS)
    loaded.main([*options, "--seconds=0", "--threads=1", f"--json={tmp_path / 'out.json'}"])
    seen = json.loads((tmp_path / "out.json").read_text())
    assert len(seen["rows"]) == rows and len(capsys.readouterr().out.splitlines()) == rows + 2
    for row in seen["rows"]:
        rate = row["GB/s"] / PEAKS["read"] if row["bound"] == "memory" else row["Gop/s"] / PEAKS[row["bound"]]
        assert row["us"] > 0 and row["percent"] == pytest.approx(100 * 1e9 * rate)
