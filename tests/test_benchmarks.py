"""The programs in benchmarks/: their arithmetic, their files and how they talk to peers. No test looks at a timing."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def module(path, monkeypatch):
    """Import a program as `python benchmarks/...` does: with its folder on the path."""
    monkeypatch.syspath_prepend(str((BENCHMARKS / path).parent))
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / path)
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, loaded)
    spec.loader.exec_module(loaded)
    return loaded


def record(rounds=3, int8=1e12):
    """A comparison with two peers: the second is half as fast in the prompt, equally fast after it, and drifts."""
    fast = [{"first_token_s": 1.0 * drift, "decode_s": 2.0 * drift} for drift in (1, 1.5, 0.8)[:rounds]]
    slow = [{"first_token_s": 2 * r["first_token_s"], "decode_s": r["decode_s"]} for r in fast]
    facts = {"weight_bytes": 700e6, "peak_memory_bytes": 9e8, "load_s": 1.5}
    return {
        "shape": "some-shape",
        "workload": {"prompt": 512, "new": 65, "depth": 0, "batch": 1, "beams": 1},
        "machine": {"cpu": "some CPU", "threads": 2, "isa": "avx2"},
        "peaks": [{"read": 30e9, "int8": int8, "bf16": None, "fp32": 1e11}] * rounds,
        "gop_per_prompt": 500.0,
        "cache_bytes_per_step": 50e6,
        "peers": {"llmrt-int4": {"facts": facts, "rounds": fast}, "other": {"facts": facts, "rounds": slow}},
    }


def test_summary_of_peers(monkeypatch):
    report = module("peers_report.py", monkeypatch)
    first, second = report.summarize(record())
    assert first["prefill_ratio"] == first["decode_ratio"] == second["decode_ratio"] == 1
    assert second["prefill_ratio"] == pytest.approx(2)
    assert first["prefill_tokens_per_s"] == pytest.approx(512) and second["prefill_tokens_per_s"] == pytest.approx(256)
    assert first["decode_tokens_per_s"] == pytest.approx(32)
    assert first["percent_of_int8_peak"] == pytest.approx(50)  # 500 Gop in one second of 1000
    assert first["percent_of_read_bandwidth"] == pytest.approx(100 * 32 * 750e6 / 30e9)
    assert report.summarize(record(int8=None))[0]["percent_of_int8_peak"] is None


def test_table_and_plot_of_peers(monkeypatch, tmp_path):
    report = module("peers_report.py", monkeypatch)
    for peak in (1e12, None):
        seen = record(int8=peak)
        rows = report.summarize(seen)
        lines = report.table(seen, rows).splitlines()
        assert len({len(line) for line in lines[-3:]}) == 1  # aligned
        assert "some CPU, 2 threads" in lines[1] and "llmrt-int4" in lines[2]
        assert lines[-1].split()[:3] == ["other", "256.0", "2.00"]
    pytest.importorskip("matplotlib")
    report.plot(seen, rows, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_peers_options(monkeypatch, capsys):
    peers = module("peers.py", monkeypatch)
    args = peers.parse(["--peers", "bf16,llama.cpp", "--rounds", "7"])
    assert args.peers == ["bf16", "llama.cpp"] and args.rounds == 7 and args.prompt == 512
    for bad, message in (
        (["--peers", "llmrt-int4,nobody"], "unknown nobody"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--threads", "100000"], "--threads is 100000"),
        (["--shape", "nothing"], "nothing"),
    ):
        with pytest.raises(SystemExit):
            peers.parse(bad)
        assert message in capsys.readouterr().err


FAKE_PEER = """
import sys
sys.path.insert(0, {folder!r})
from protocol import serve
count = 0
def run():
    global count
    count += 1
    print("noise on standard output")
    if count == {fails}:
        raise RuntimeError("no more")
    return {{"first_token_s": float(count), "decode_s": 1.0}}
serve(lambda: ({{"load_s": 0.0}}, run))
"""


def test_workers_answer_and_report_errors(monkeypatch, tmp_path):
    peers = module("peers.py", monkeypatch)
    script = tmp_path / "peer.py"
    script.write_text(FAKE_PEER.format(folder=str(BENCHMARKS / "workers"), fails=3))
    worker = peers.Worker([sys.executable, str(script)], cpus=[0])
    assert worker.facts["load_s"] == 0.0 and worker.facts["peak_memory_bytes"] > 1e6
    assert [worker.run()["first_token_s"] for _ in range(2)] == [1.0, 2.0]
    with pytest.raises(RuntimeError, match="no more"):
        worker.run()
    worker.stop()
    script.write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="status 3"):
        peers.Worker([sys.executable, str(script)], cpus=[0])


@pytest.mark.parametrize("kind", ["llmrt-int4", "bf16"])
def test_transformers_worker(kind):
    options = ["--shape=tiny", "--group-size=32", "--lm-head=int8", "--prompt=6", "--new=3", "--depth=4", "--threads=1"]
    command = [sys.executable, str(BENCHMARKS / "workers" / "transformers_model.py"), kind, *options]
    result = subprocess.run(command, input="run\nrun\n", capture_output=True, text=True, check=True)
    ready, *runs = [json.loads(line) for line in result.stdout.splitlines()]
    assert ready["ready"]["weight_bytes"] > 0 and len(runs) == 2
    assert all(r["result"]["first_token_s"] > 0 and r["result"]["decode_s"] > 0 for r in runs)


def test_torch_int4_linear_reads_its_weight_as_documented(monkeypatch):
    torch_int4 = module("workers/torch_int4.py", monkeypatch)
    linear = torch.nn.Linear(64, 32, bias=True)
    quantized = torch_int4.TorchInt4Linear(linear, group_size=32)
    codes = torch.randint(16, (32, 64), dtype=torch.int32)
    quantized.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    expected = x.float() @ ((codes - 8) / (4.6 * 64**0.5)).T + linear.bias
    assert (quantized(x).float() - expected).abs().max() < 0.05 * expected.abs().max()
    with pytest.raises(ValueError, match="groups of 48"):
        torch_int4.TorchInt4Linear(linear, group_size=48)


def test_gguf_dimensions(monkeypatch):
    peers = module("peers.py", monkeypatch)
    fields = peers.gguf_fields("llama-3.2-1b")
    assert fields["head_dim"] == 64 and fields["rope_theta"] == 500000 and fields["tie_word_embeddings"] is True
    with pytest.raises((ValueError, AttributeError)):
        peers.gguf_fields("no-such")


def test_gguf_file_has_the_bytes_of_its_format(monkeypatch, tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = module("workers/gguf_file.py", monkeypatch)
    peers = module("peers.py", monkeypatch)
    fields = peers.gguf_fields("llama-3.2-1b") | {"num_hidden_layers": 1, "vocab_size": 256, "hidden_size": 256}
    writer.write(str(tmp_path / "x.gguf"), fields | {"intermediate_size": 512})
    tensors = {t.name: t for t in gguf.GGUFReader(str(tmp_path / "x.gguf")).tensors}
    assert tensors["blk.0.ffn_down.weight"].n_bytes == 256 * 512 * 18 // 32
    assert tensors["token_embd.weight"].n_bytes == 256 * 256 * 210 // 256


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
def test_operator_benchmarks(program, options, rows, monkeypatch, tmp_path, capsys):
    peaks = {"read": 1e10, "int8": 1e12, "bf16": 5e11, "fp32": 2e11}
    threads = torch.get_num_threads()
    loaded = module(f"ops/{program}", monkeypatch)
    monkeypatch.setattr(sys.modules["harness"], "machine_peaks", lambda: peaks)
    try:
        loaded.main([*options, "--seconds=0", "--threads=1", f"--json={tmp_path / 'out.json'}"])
    finally:
        torch.set_num_threads(threads)
    seen = json.loads((tmp_path / "out.json").read_text())
    assert len(seen["rows"]) == rows and len(capsys.readouterr().out.splitlines()) == rows + 2
    for row in seen["rows"]:
        rate = row["GB/s"] / peaks["read"] if row["bound"] == "memory" else row["Gop/s"] / peaks[row["bound"]]
        assert row["us"] > 0 and row["percent"] == pytest.approx(100 * 1e9 * rate)


def compile_record():
    """Two backends: the second compiles in a quarter of the time, is as fast in the prompt and half as fast after it."""
    base = [{"first_token_s": 1.0 * drift, "decode_s": 2.0 * drift} for drift in (1, 1.5, 0.8)]
    other = [{"first_token_s": r["first_token_s"], "decode_s": 2 * r["decode_s"]} for r in base]
    facts = {"peak_memory_bytes": 9e8, "graphs": 2, "layers": 4, "version": "torch 2"}
    return {
        "shape": "some-shape",
        "cache": "static",
        "prompt": 512,
        "new": 65,
        "machine": {"cpu": "some CPU", "threads": 2, "isa": "avx2"},
        "backends": {
            "inductor": {"facts": facts | {"first_call_s": 23.0}, "rounds": base},
            "llmrt-eager": {"facts": facts | {"first_call_s": 10.0}, "rounds": other},
        },
    }


def test_summary_table_and_plot_of_compile(monkeypatch, tmp_path):
    program = module("compile.py", monkeypatch)
    seen = compile_record()
    rows = program.summarize(seen)
    assert [row["compile_s"] for row in rows] == pytest.approx([20, 5])
    assert rows[1]["compile_ratio"] == pytest.approx(0.25)
    assert rows[1]["prefill_ratio"] == pytest.approx(1) and rows[1]["decode_ratio"] == pytest.approx(0.5)
    assert rows[0]["prefill_tokens_per_s"] == pytest.approx(512) and rows[1]["decode_tokens_per_s"] == pytest.approx(16)
    lines = program.table(seen, rows).splitlines()
    assert "some CPU, 2 threads" in lines[1] and lines[-1].startswith(
        "| llmrt-eager | 10.0 | 5.0 | 0.25 | 2 | 512.0 | 1.00 |"
    )
    pytest.importorskip("matplotlib")
    program.plot(seen, rows, tmp_path / "compile.png")
    assert (tmp_path / "compile.png").read_bytes().startswith(b"\x89PNG")


def test_compile_options(monkeypatch, capsys):
    program = module("compile.py", monkeypatch)
    args = program.parse(["--backends", "inductor,llmrt-eager", "--layers", "4"])
    assert args.backends == ["inductor", "llmrt-eager"] and args.layers == 4 and args.cache == "static"
    for bad, message in (
        (["--backends", "inductor,nobody"], "unknown nobody"),
        (["--backends", "eager"], "inductor is missing"),
        (["--new", "1"], "--new is 1"),
        (["--threads", "0"], "--threads is 0"),
    ):
        with pytest.raises(SystemExit):
            program.parse(bad)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "cache"), [("eager", "static"), ("llmrt-eager", "static"), ("llmrt-eager", "dynamic")]
)
def test_compiled_worker(kind, cache):
    options = ["--shape=tiny", "--layers=1", f"--cache={cache}", "--prompt=6", "--new=4", "--threads=1"]
    command = [sys.executable, str(BENCHMARKS / "workers" / "compiled_model.py"), kind, *options]
    result = subprocess.run(command, input="run\nrun\n", capture_output=True, text=True, check=True)
    ready, *runs = [json.loads(line) for line in result.stdout.splitlines()]
    graphs = {"eager": 0, "llmrt-eager": {"static": 2, "dynamic": 3}[cache]}[kind]
    assert ready["ready"]["graphs"] == graphs and ready["ready"]["graph_breaks"] == 0 and len(runs) == 2
    assert ready["ready"]["first_call_s"] > 0 and ready["ready"]["layers"] == 1
    assert all(r["result"]["first_token_s"] > 0 and r["result"]["decode_s"] > 0 for r in runs)
