"""`llmrt bench`: what it measures is complete and consistent; no test looks at how fast anything was."""

import json
import statistics

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from llmrt.llm import bench as bench_command
from llmrt.llm import doctor, measure, random_weights
from llmrt.llm.families.shapes import SHAPES, shape_config, shape_names
from llmrt.llm.linear import QuantLinear, Scheme
from llmrt.llm.measure import Timing, Work, Workload
from llmrt.ops.formats import FORMATS

PEAKS = {"read": 1e10, "int8": 1e12, "bf16": 5e11, "fp32": None}


@pytest.fixture(autouse=True)
def fixed_peaks(monkeypatch):
    """The probes take seconds; their own test is doctor's."""
    monkeypatch.setattr(doctor, "measured_peaks", lambda threads: dict(PEAKS))


def run(*arguments):
    app = typer.Typer()
    app.command()(bench_command.bench)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def record_of(*arguments):
    result = run(*arguments, "--no-table", "--iters", 2, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--weight-dtype", "int8", "--scheme", "asym", "--group-size", 32, "--lm-head", "none"],
        ["--lm-head", "int4", "--compute-dtype", "fp32", "--dtype", "float32", "--batch", 2],
        ["--weight-dtype", "none", "--beams", 3],
        ["--weight-dtype", "none", "--plain", "--depth", 9],
        ["--depth", 20, "--batch", 2],
    ],
    ids=lambda options: " ".join(map(str, options)) or "defaults",
)
def test_record_is_complete_and_consistent(options):
    record = record_of("--shape", "tiny", "-p", 12, "-n", 5, "--warmup", 0, *options)
    load, results, limits = record["workload"], record["results"], record["limits"]
    assert [len(run["next_token_ms"]) for run in results["iterations"]] == [4, 4]
    first = statistics.median(run["first_token_ms"] for run in results["iterations"])
    assert results["first_token_ms"] == pytest.approx(first)
    assert results["prefill_tokens_per_s"] == pytest.approx(1e3 * load["batch"] * 12 / first)
    step_s = load["batch"] / results["decode_tokens_per_s"]
    read = 1e9 * limits["gb_per_step"]
    assert limits["percent_of_read_bandwidth"] == pytest.approx(100 * read / step_s / PEAKS["read"])
    assert read > record["weight_bytes"] > 0
    peak = PEAKS[limits["compute_unit"]]
    if peak is None:
        assert limits["percent_of_compute_peak"] is None
    else:
        rate = 1e9 * limits["gop_per_prompt"] / (first / 1e3)
        assert limits["percent_of_compute_peak"] == pytest.approx(100 * rate / peak)
    assert record["peak_memory_bytes"] > 0 and record["load_s"] > 0
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert set(record["machine"]["versions"]) >= {"torch", "transformers", "llmrt", "python"}


def test_table_and_file(tmp_path):
    result = run("--shape", "tiny", "-p", 4, "-n", 2, "--iters", 1, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out.json").read_text())
    for text in (f"{record['results']['prefill_tokens_per_s']:.1f} tok/s", "peak memory", "read 10.0 GB/s", "int4 sym"):
        assert text in result.stdout


def test_model_directory(tmp_path):
    config = shape_config("tiny")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    record = record_of(tmp_path, "-p", 4, "-n", 2, "--warmup", 0)
    assert record["model"] == str(tmp_path)
    assert record["settings"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either a model directory or --shape"),
        (["demo", "--shape", "tiny"], "give either"),
        (["--shape", "no-such"], "shape 'no-such' is unknown; known shapes: "),
        (["/no/such/model"], "/no/such/model"),
        (["--shape", "tiny", "--lm-head", "fp7"], "lm_head is 'fp7'; valid: int8, int4, none"),
        (["--shape", "tiny", "--group-size", 3], "group_size is 3"),
        (["--shape", "tiny", "--plain"], "weight_dtype is 'int4' without optimize"),
        (["--shape", "tiny", "--depth", 4, "--beams", 2], "depth is 4 with 2 beams"),
        (["--shape", "tiny", "-p", 1000], "is 1064 tokens; the model's maximum is 1024"),
        (["--shape", "tiny", "-n", 1], "'-n'"),
        (["--shape", "tiny", "--weight-dtype", "int3"], "int3"),
        (["--shape", "tiny", "--json", "/no/such/folder/x.json"], "/no/such/folder"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_arguments(options, message):
    result = run(*options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_shapes_are_listed_and_sized():
    names = run("--shape", "list").stdout.split()
    assert names == shape_names() and "tiny" not in names
    billions = {
        "llama-3.2-1b": 1.236,
        "llama-3.1-8b": 8.030,
        "llama-2-7b": 6.738,
        "qwen3-4b": 4.022,
        "phi-3-mini": 3.821,
    }
    for name, expected in billions.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape_config(name))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(expected, abs=5e-4)


def test_counts_of_the_default_shape():
    """The figures of the design: 973 M weights in the layers, 263 M in the head."""
    work = measure.count_shape(shape_config("llama-3.2-1b"), torch.bfloat16, weight_bytes=0)
    assert (round(work.layer_macs / 1e6), round(work.head_macs / 1e6)) == (973, 263)
    assert work.kv_bytes == 2 * 8 * 64 * 2 and work.windows == (0,) * 16


@pytest.mark.parametrize("head", ["int8", "none"])
def test_weight_bytes_are_the_packed_ones(head):
    model = bench_command.build(shape_config("tiny"), bench_command.Settings(group_size=32, lm_head=head))
    packed = sum(b.numel() for b in model.buffers() if b.dtype == torch.uint8)
    table = model.get_input_embeddings().weight
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if p is not table)
    counted = measure.count_work(model, torch.bfloat16).weight_bytes
    small = sum(b.numel() * b.element_size() for b in model.buffers() if b.dtype != torch.uint8)
    assert packed + rest <= counted <= packed + rest + small
    config = model.config
    assert packed > config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size / 2


def test_random_weights_are_codes_of_the_right_spread():
    linear = torch.nn.Linear(300, 600, bias=False, device="meta")
    for name, row in FORMATS.items():
        scheme, compute = "asym" if row.integer else "sym", row.computes[0]
        settings = bench_command.Settings(weight_dtype=name, scheme=scheme, compute_dtype=compute)
        layout = settings.quantization().layout()
        made = random_weights.RandomLinear(linear, layout, seed=3)
        assert sum(b.untyped_storage().nbytes() for b in made.buffers()) < 64
        twice = zip(made.canonical(), made.canonical(), strict=True)
        assert all(a is b if a is None else torch.equal(a, b) for a, b in twice)
        dense = torch.nn.Linear(300, 600, bias=False)
        packed = QuantLinear.from_linear(made, Scheme(layout, compute))
        dense.weight.data = packed.dequantized()
        assert dense.weight.std().item() == pytest.approx(300**-0.5, rel=0.05)


def test_summary_takes_medians():
    runs = [Timing(1.0, (0.1, 0.3)), Timing(3.0, (0.2, 0.2)), Timing(2.0, (0.5, 0.5))]
    summary = measure.summarize(runs, Workload(prompt=10, new=3, batch=2))
    assert summary["first_token_ms"] == 2000 and summary["prefill_tokens_per_s"] == 10
    assert summary["decode_tokens_per_s"] == pytest.approx(2 / 0.2)
    assert summary["next_token_ms"] == pytest.approx(250) and summary["next_token_p90_ms"] == pytest.approx(500)


def test_cache_bytes_count_windows_and_beams():
    work = Work(0, 0, 0, kv_bytes=4, windows=(0, 6))
    # Two steps after a prompt of 5: 6 and 7 tokens in the full layer, 6 in the window.
    assert work.cache_bytes(Workload(prompt=5, new=3)) == 4 * ((6 + 7) + (6 + 6)) / 2
    full = Work(0, 0, 0, kv_bytes=1, windows=(0,))
    # The prompt of 5 is read once for 3 beams, the own 1 and 2 tokens by each.
    assert full.cache_bytes(Workload(prompt=5, new=3, beams=3)) == ((5 + 3) + (5 + 6)) / 2


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.mark.parametrize("name", sorted({row["model_type"]: name for name, row in SHAPES.items()}.values()))
def test_every_kind_of_shape_runs(name):
    """One shape per model type, made small: everything on the CPU, every linear quantized, tokens come out."""
    model = bench_command.build(shape_config(name, **SMALL), bench_command.Settings(group_size=32))
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert not model.optimization_report.unoptimized
    assert not any(isinstance(m, torch.nn.Linear) for m in model.modules())
    timing = measure.Stopwatch(model, Workload(prompt=7, new=3)).run()
    assert timing.first > 0 and len(timing.next) == 2
    assert torch.isfinite(model(torch.arange(8).unsqueeze(0)).logits).all()
