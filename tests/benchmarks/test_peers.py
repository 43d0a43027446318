"""benchmarks/peers.py and sweeps.py: options, arithmetic, tables, plots, and how they talk to workers."""

import sys

import pytest

FAKE_PEER = """
import sys
sys.path.insert(0, {folder!r})
from protocol import serve
count = 0
def run(prompt, **rest):
    global count
    count += 1
    print("noise on standard output")
    if count == {fails}:
        raise RuntimeError("no more")
    return {{"first_token_s": float(count), "decode_s": float(prompt)}}
serve(lambda: ({{"load_s": 0.0}}, run))
"""


def point(rounds=3, int8=1e12, **workload):
    """A workload with two peers: the second is half as fast in the prompt, equally fast after it, and drifts."""
    fast = [{"first_token_s": 1.0 * drift, "decode_s": 2.0 * drift} for drift in (1, 1.5, 0.8)[:rounds]]
    slow = [{"first_token_s": 2 * r["first_token_s"], "decode_s": r["decode_s"]} for r in fast]
    return {
        "workload": {"prompt": 512, "new": 65, "depth": 0, "batch": 1, "beams": 1} | workload,
        "peaks": [{"read": 30e9, "int8": int8, "bf16": None, "fp32": 1e11}] * rounds,
        "gop_per_prompt": 500.0,
        "attention_gop_per_prompt": 25.0,
        "cache_bytes_per_step": 50e6,
        "rounds": {"llmrt:int4": fast, "other:one": slow},
    }


def record(*points):
    facts = {"weight_bytes": 700e6, "peak_memory_bytes": 9e8, "load_s": 1.5, "unit": "int8"}
    machine = {"cpu": "some CPU", "threads": 2, "isa": "avx2"}
    return {
        "shape": "some-shape",
        "machine": machine,
        "facts": {"llmrt:int4": facts, "other:one": facts},
        "left_out": {},
        "points": points,
    }


def test_summary(load):
    report = load("peers_report.py")
    seen = record(point())
    first, second = report.summarize(seen, seen["points"][0])
    assert first["prefill_ratio"] == first["decode_ratio"] == second["decode_ratio"] == 1
    assert second["prefill_ratio"] == pytest.approx(2) and second["call_ratio"] == pytest.approx(4 / 3)
    assert first["prefill_tokens_per_s"] == pytest.approx(512) and second["prefill_tokens_per_s"] == pytest.approx(256)
    assert first["decode_tokens_per_s"] == pytest.approx(32) and first["call_s"] == pytest.approx(3)
    assert first["percent_of_peak"] == pytest.approx(50)  # 500 Gop in one second of 1000
    assert first["percent_of_read_bandwidth"] == pytest.approx(100 * 32 * 750e6 / 30e9)
    assert report.summarize(seen, point(int8=None))[0]["percent_of_peak"] is None


def test_summary_counts_the_tokens_of_all_sequences(load):
    report = load("peers_report.py")
    one, four = (report.summarize(record(p), p)[0] for p in (point(), point(batch=4)))
    for field in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        assert four[field] == pytest.approx(4 * one[field])
    assert four["percent_of_read_bandwidth"] == pytest.approx(one["percent_of_read_bandwidth"])


def test_table_and_plot(load, tmp_path):
    report = load("peers_report.py")
    for peak in (1e12, None):
        seen = record(point(int8=peak, batch=4))
        rows = report.summarize(seen, seen["points"][0])
        lines = report.table(seen, rows).splitlines()
        assert len({len(line) for line in lines[-3:]}) == 1  # aligned
        assert "batch 4" in lines[0] and "some CPU, 2 threads" in lines[1] and "llmrt:int4" in lines[3]
        assert lines[-1].split()[:3] == ["other:one", "1024.0", "2.00"]
    pytest.importorskip("matplotlib")
    report.plot(seen, rows, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_sweeps(load, tmp_path):
    report = load("sweeps_report.py")
    decode = [point(prompt=1, depth=depth) for depth in (0, 512)]
    seen = record(*decode, point(prompt=128), point(prompt=512))
    curves = report.summarize(seen)
    assert [p["at"] for p in curves["decode"]["other:one"]] == [0, 512]
    last = curves["prefill"]["llmrt:int4"][-1]
    # 500 Gop at the int8 peak take 0.5 s, 25 Gop of attention at the fp32 peak, there being no bf16 unit, 0.25 s: of 1 s.
    assert last["at"] == 512 and last["percent"] == pytest.approx(75) and last["tokens_per_s"] == pytest.approx(512)
    assert curves["prefill"]["other:one"][-1]["ratio"] == pytest.approx(2)
    lines = report.table(seen, curves).splitlines()
    assert any(line.split() == ["peer", "0", "512"] for line in lines)
    assert lines[-1].startswith("other:one") and "256.0 (38 %; 2.00)" in lines[-1]
    pytest.importorskip("matplotlib")
    report.plot(seen, curves, tmp_path / "sweeps.png")
    assert (tmp_path / "sweeps.png").read_bytes().startswith(b"\x89PNG")


def test_options_of_peers(load, capsys, tmp_path):
    peers = load("peers.py")
    args = peers.parse(["--peers", "eager,llmrt:int8", "--rounds", "7", "-b", "4"])
    assert args.peers == ["eager:bf16", "llmrt:int8"] and args.rounds == 7
    assert (args.workload.prompt, args.workload.batch) == (512, 4)
    llama = ["--peers", "llama.cpp", "--llama-python", sys.executable]
    for bad, message in (
        (["--peers", "llmrt:int4,nobody"], "unknown peer 'nobody'"),
        (["--peers", "openvino:int2"], "unknown variant 'int2' of openvino"),
        (["--peers", "eager,eager:bf16"], "named twice"),
        (["--peers", "llmrt", "--rounds", "0"], "--rounds is 0"),
        (["--peers", "llmrt", "--threads", "100000"], "--threads is 100000"),
        (["--peers", "llmrt", "--new", "1"], "new is 1"),
        (["--peers", "llmrt", "--shape", "demo", "-p", "5000"], "the model's maximum is 1024"),
        (["--peers", "openvino", "--peers-dir", str(tmp_path)], "install_peers.py installs it"),
        (["--peers", "inductor", "--depth", "8"], "static cache"),
        ([*llama, "--beams", "4"], "llama.cpp:q4_0 has no beam search"),
        (["--shape", "nothing"], "nothing"),
    ):
        with pytest.raises(SystemExit):
            peers.parse(bad)
        assert message in capsys.readouterr().err


def test_options_of_sweeps(load, capsys):
    sweeps = load("sweeps.py")
    args = sweeps.parse(["--peers", "llmrt", "--depths", "0,64", "--lengths", "32", "-n", "5"])
    loads = [(load.prompt, load.new, load.depth) for load in args.workloads]
    assert loads == [(1, 5, 0), (1, 5, 64), (32, 2, 0)]
    assert len(sweeps.parse(["--peers", "llmrt", "--sweeps", "prefill"]).workloads) == 5
    for bad, message in ((["--sweeps", "width"], "unknown width"), (["--depths", "-1"], "depth is -1")):
        with pytest.raises(SystemExit):
            sweeps.parse(["--peers", "llmrt", *bad])
        assert message in capsys.readouterr().err


def test_command_lines(load):
    fleet, peers = load("fleet.py"), load("peers.py")
    options = ["--llama-python", sys.executable, "--openvino-python", sys.executable]
    args = peers.parse(["--peers", "llama.cpp:some.gguf,openvino:int4-d32,linears", *options, "-b", "2"])
    llama, openvino, linears = (fleet.command(peer, args, [args.workload]) for peer in args.peers)
    assert llama[2:] == ["some.gguf", f"--threads={args.threads}", "--length=576", "--batch=2"]
    assert openvino[2] == "int4" and "--dynamic-group=32" in openvino
    assert linears[2:4] == ["linears", "int4"]


def test_attention_operations(load):
    fleet = load("fleet.py")
    config, load_ = fleet.model_config("llama-3.2-1b"), fleet.measure.Workload(prompt=3, new=2, depth=2)
    assert fleet.attention_ops(config, load_) == 16 * 4 * 32 * 64 * (3 + 4 + 5)
    windowed = fleet.model_config("phi-3-mini")
    load_ = fleet.measure.Workload(prompt=1, new=2, depth=3000)
    assert fleet.attention_ops(windowed, load_) == 32 * 4 * 32 * 96 * 2047


def test_workers_answer_and_report_errors(load, folder, tmp_path):
    fleet = load("fleet.py")
    script = tmp_path / "peer.py"
    script.write_text(FAKE_PEER.format(folder=str(folder / "workers"), fails=3))
    worker = fleet.Worker([sys.executable, str(script)], cpus=[0])
    assert worker.facts["load_s"] == 0.0 and worker.facts["peak_memory_bytes"] > 1e6
    assert [worker.run(prompt=5, new=2)["first_token_s"] for _ in range(2)] == [1.0, 2.0]
    with pytest.raises(RuntimeError, match="no more"):
        worker.run(prompt=5)
    worker.stop()
    script.write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="status 3"):
        fleet.Worker([sys.executable, str(script)], cpus=[0])


def test_all_points_are_measured_by_all_peers(load, folder, tmp_path, monkeypatch):
    fleet, sweeps = load("fleet.py"), load("sweeps.py")
    script = tmp_path / "peer.py"
    script.write_text(FAKE_PEER.format(folder=str(folder / "workers"), fails=-1))
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)")
    scripts = {"linears:int4": broken}
    monkeypatch.setattr(fleet, "command", lambda peer, *rest: [sys.executable, str(scripts.get(peer, script))])
    monkeypatch.setattr(fleet.measure, "machine_peaks", lambda: {"read": 1e10})
    options = ["--shape", "tiny", "--rounds", "2", "--pause", "0", "--threads", "1"]
    args = sweeps.parse(["--peers", "llmrt,linears,eager", *options, "--depths", "4", "--lengths", "8"])
    seen = fleet.measure_peers(args, args.workloads)
    assert seen["left_out"] == {"linears:int4": "its process ended with status 3"}
    assert [p["workload"]["prompt"] for p in seen["points"]] == [1, 8]
    for measured in seen["points"]:
        assert len(measured["peaks"]) == 2 and set(measured["rounds"]) == {"llmrt:int4", "eager:bf16"}
        assert all(
            [r["decode_s"] for r in rounds] == [measured["workload"]["prompt"]] * 2
            for rounds in measured["rounds"].values()
        )
    args.peers = ["linears:int4", "llmrt:int4"]
    with pytest.raises(RuntimeError, match="status 3"):
        fleet.measure_peers(args, args.workloads)
