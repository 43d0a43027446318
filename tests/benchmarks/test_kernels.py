"""The operator benchmarks: rows, limits and what runs them all."""

import json
import sys

import pytest
import torch

from llmrt.ops.formats import FORMATS, Layout

#: Every row of the table, symmetric and asymmetric.
EVERY_FORMAT = ",".join(
    str(Layout(name, asymmetric, 32, torch.bfloat16))
    for name, row in FORMATS.items()
    for asymmetric in (False, True)[: 1 + row.integer]
)
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
        (
            "bench_linear.py",
            ["--rows=2", "--sizes=64x32", f"--layouts={EVERY_FORMAT}", "--computes=int8,bf16,fp32"],
            22,
        ),
        ("bench_static_linear.py", ["--rows=1,9", "--sizes=64x32", "--rivals=quant_linear,bf16", "--factors"], 2),
        ("bench_attention.py", ["--cases=1x8,4x8", "--heads=4x2x16"], 2),
        ("bench_norm.py", ["--rows=2", "--sizes=64"], 4),
        ("bench_dense.py", ["--rows=1,40", "--sizes=64x32"], 6),
        ("bench_gated.py", ["--rows=2", "--sizes=64"], 3),
        ("bench_experts.py", ["--rows=1,5", "--sizes=64x32", "--experts=4", "--chosen=2"], 2),
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


def test_triton_benchmark(load, monkeypatch, tmp_path, capsys):
    """On the CPU, with another clock: interpreted kernels are compared with their rivals, but their times would mean nothing."""
    pytest.importorskip("triton")
    program = load("ops/bench_triton.py")
    monkeypatch.setattr(program, "gpu", lambda: ("cpu", "none"))
    monkeypatch.setattr(program, "seconds", lambda call: 1e-3)
    options = ["--rows=1,3", "--sizes=64x32", "--tokens=1,8", "--cached=8", "--layout=int4_sym_g32_bf16"]
    options.append("--experts=4,2,64,32")
    program.main([*options, f"--json={tmp_path / 'out.json'}"])
    seen = json.loads((tmp_path / "out.json").read_text())
    assert [row["op"] for row in seen["rows"]] == [
        *["quant_linear"] * 4,
        *["static_linear"] * 2,
        *["quant_experts"] * 2,
        *["attention"] * 6,
    ]
    assert seen["bytes_per_second"] == 2e3 * (1 << 30) and all(row["speedup"] == 1 for row in seen["rows"])
    assert "a copy moves 2147 GB/s" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available() or torch.xpu.is_available(), reason="there is a GPU")
def test_triton_benchmark_needs_a_gpu(load):
    with pytest.raises(SystemExit, match="needs a CUDA or XPU GPU"):
        load("ops/bench_triton.py").main([])


def test_all_operators_of_a_shape(load, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    program = load("operators.py")
    monkeypatch.setattr(program, "QUICK_ROWS", (1, 40))
    monkeypatch.setattr(program.measure, "machine_peaks", lambda: PEAKS)
    options = ["--shape=tiny", "--quick", "--only=linear,norm", "--layouts=int4_sym_g32_bf16,int8_sym_channel_f32"]
    program.main([*options, "--computes=int8", "--threads=1", f"--out={tmp_path}"])
    seen = json.loads((tmp_path / "operators-tiny.json").read_text())
    assert set(seen["rows"]) == {"linear", "norm"} and len(seen["peaks"]) == 3
    linear = seen["rows"]["linear"]
    assert {(row["K"], row["N"]) for row in linear} == {(64, 128), (64, 64), (64, 320), (160, 64), (64, 264)}
    assert all(row["M"] == 1 for row in linear if row["N"] == 264)  # the head
    for row in linear:
        assert row["x bf16"] == pytest.approx(row["bf16 us"] / row["us"])
        able = row["layout"].startswith("int4") and row["N"] % 16 == 0
        assert (row["x int4pack"] is not None) == able
    assert {(row["rival"], row["at"]) for row in seen["extremes"]} == {
        (rival, span) for rival in ("bf16", "int4pack") for span in ("one row", "more rows")
    }
    assert "least ahead of rivals" in capsys.readouterr().out
    assert (tmp_path / "operators-tiny.png").read_bytes().startswith(b"\x89PNG")


def test_the_loop_over_experts_is_their_product(load):
    pytest.importorskip("triton")
    program = load("ops/bench_triton.py")
    sample = next(s for s in program.ops.quant_experts.sample_inputs(torch.float32) if s.args[5] is None)
    x, indices, scores, gate_up, down, _, _, first, second, width, *_ = sample.args
    rows = 2 * (-(-width // 16) * 16)
    ups, downs = [], []
    for expert in range(len(gate_up)):
        for found, packed, layout, n, k in (
            (ups, gate_up, first, rows, x.shape[1]),
            (downs, down, second, x.shape[1], width),
        ):
            codes, scales, zeros = program.ops.unpack_weight(packed[expert], layout, n, k)
            form = Layout.parse(layout)
            found.append(program.ops.dequantize(codes, scales, zeros if form.asymmetric else None, form, k))
    parts = torch.stack(ups).unflatten(1, (-1, 2, 16))
    gates = torch.cat([parts[:, :, i].flatten(1, 2)[:, :width] for i in (0, 1)], 1)
    expected = program.ops.quant_experts(*sample.args[:10], "fp32", "fp32", "silu")
    actual = program.loop_over_experts(x, indices, scores.to(x.dtype), gates, torch.stack(downs))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_extremes_are_the_least_ratios(load):
    load("ops/harness.py")
    report = load("operators_report.py")
    rows = [
        {"M": m, "K": 8, "compute": "int8", "us": 1.0, "percent": 50.0, "x bf16": x} for m, x in ((1, 3.0), (64, 2.0))
    ]
    rows += [{**rows[1], "K": 16, "x bf16": 1.5}, {**rows[1], "x bf16": None}]
    one, many = report.extremes({"linear": rows})
    assert (one["at"], one["x least"]) == ("one row", 3.0)
    assert (many["at"], many["x least"], many["case"]) == ("more rows", 1.5, "M 64, K 16, compute int8")
    assert report.curves(rows[:2]) == {"K=8 int8": [(1, 50.0), (64, 50.0)]}


def test_options_of_operators(load, capsys):
    program = load("operators.py")
    plan = dict(program.plan(program.parse(["--shape", "llama-3.2-1b", "--quick"])))
    assert set(plan) == set(program.PROGRAMS)
    assert "--cases=1x512,1x8192,8x512,8x8192,512x512,512x8192" in plan["attention"]
    sizes, head = program.linear_sizes("llama-3.2-1b")
    assert sizes == [(2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048)] and head == (2048, 128256)
    for bad, message in ((["--only", "convolution"], "unknown convolution"), (["--threads", "0"], "--threads is 0")):
        with pytest.raises(SystemExit):
            program.parse(bad)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("case", [(1, 9), (4, 9), (6, 6)])
def test_attention_is_compared_with_the_same_product(case, load):
    program = load("ops/bench_attention.py")
    s, t = case
    query, key, value = torch.randn(1, s, 4, 16), torch.randn(1, 2, t, 16), torch.randn(1, 2, t, 16)
    ours = program.ops.attention(query, key, value, t, 16**-0.5)
    torch.testing.assert_close(program.rival(query, key, value)().transpose(1, 2), ours, atol=1e-5, rtol=1e-4)


def test_contestants_take_turns(load):
    harness = load("ops/harness.py")
    order = []
    first, second = ([lambda n=n, i=i: order.append((n, i)) for i in range(2)] for n in "ab")
    assert len(harness.alternate([first, second], 0.0)) == 2
    assert order[2:] == [(n, i % 2) for i in range(5) for n in "ab"]  # after one of each for warm-up
