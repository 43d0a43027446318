"""benchmarks/compile.py: its arithmetic, its options and its worker."""

import json
import subprocess
import sys

import pytest
import torch


def record():
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


def test_summary_table_and_plot(load, tmp_path):
    program = load("compile.py")
    seen = record()
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


def test_options(load, capsys):
    program = load("compile.py")
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


def options(kind, cache):
    return [kind, "--shape=tiny", "--layers=1", f"--cache={cache}", "--prompt=6", "--new=4", "--threads=1"]


def check(facts, graphs, results):
    assert facts["graphs"] == graphs and facts["graph_breaks"] == 0
    assert facts["first_call_s"] > 0 and facts["layers"] == 1
    assert len(results) == 2 and all(r["first_token_s"] > 0 and r["decode_s"] > 0 for r in results)


def test_worker(folder):
    command = [sys.executable, str(folder / "workers" / "compiled_model.py"), *options("llmrt-eager", "static")]
    result = subprocess.run(command, input="{}\n{}\n", capture_output=True, text=True, check=True)
    ready, *runs = [json.loads(line) for line in result.stdout.splitlines()]
    check(ready["ready"], 2, [run["result"] for run in runs])


@pytest.fixture
def counted_anew():
    """Dynamo's counts begin at zero; it, and torch's threads, are left as they were found."""
    threads = torch.get_num_threads()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("kind", "cache", "graphs"), [("eager", "static", 0), ("llmrt-eager", "dynamic", 3)])
def test_what_a_worker_runs(kind, cache, graphs, load, counted_anew, monkeypatch):
    load("workers/protocol.py")
    worker = load("workers/compiled_model.py")
    monkeypatch.setattr(sys, "argv", [worker.__file__, *options(kind, cache)])
    facts, run = worker.load(worker.parse())
    check(facts, graphs, [run(), run()])
