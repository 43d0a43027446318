"""The command line: what it prints, and that bad input ends with exit code 2 and a message, never with a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import llmrt
from llmrt.llm.cli import app
from llmrt.llm.commands.options import WeightDType
from llmrt.llm.commands.quantize import StoredDType
from llmrt.llm.demo import demo_model_path
from llmrt.ops.formats import FORMATS

DEMO = str(demo_model_path())


def run(*arguments: str, stdin: str | None = None) -> Result:
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, list(arguments), input=stdin)
    finally:
        torch.set_num_threads(threads)


def good(*arguments: str, stdin: str | None = None) -> Result:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "demo-int4"
    result = good("quantize", "demo", str(out), "--group-size", "32")
    assert "int4_sym_g32_bf16" in result.stdout
    return out


@pytest.mark.parametrize("command", ["generate", "chat", "perplexity", "quantize", "convert", "bench", "doctor"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert f"Example: llmrt {command}" in good(command, "--help").stdout


def start(*arguments: str) -> tuple[int, str, set[str]]:
    """Run the command as its script does; return its exit code, what it printed, and the modules that it imported."""
    code = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules)); import llmrt_command; llmrt_command.main()"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    *printed, modules = result.stdout.splitlines()
    return result.returncode, "\n".join(printed) + result.stderr, set(modules.split())


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (("--help",), 0, "Continue PROMPT"),
        (("--version",), 0, f"llmrt {llmrt.__version__}"),
        (("quantize", "--help"), 0, "Example: llmrt quantize"),
        (("xpu", "build", "--help"), 0, "Example: llmrt xpu build"),
        (("generate", "x", "--beams", "0"), 2, "greater than or equal to 1"),
    ],
)
def test_help_and_mistakes_do_not_wait_for_torch(arguments: tuple[str, ...], exit_code: int, message: str) -> None:
    code, printed, modules = start(*arguments)
    assert code == exit_code and message in " ".join(printed.replace("│", " ").split())
    assert "llmrt.llm.commands.generate" in modules and not modules & {"torch", "transformers", "llmrt.ops"}


def test_a_started_command_has_the_whole_package() -> None:
    code, printed, modules = start("generate", "def parse_args(", "-n", "4", "--weight-dtype", "int4")
    assert code == 0 and printed.startswith("def parse_args(") and "generated 4 tokens" in printed
    assert {"llmrt.llm.optimize", "llmrt.llm.checkpoints", "llmrt._C"} <= modules


def test_generate_prints_text_then_timings() -> None:
    result = good("generate", "def parse_args(", "--max-new-tokens", "12")
    assert result.stdout.startswith("def parse_args(") and len(result.stdout) > 30
    assert "load " in result.stderr and "prompt 5 tokens" in result.stderr and "generated 12 tokens" in result.stderr


def test_generate_equals_transformers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    for beams in (1, 3):
        output = model.generate(**tokenizer("import ", return_tensors="pt"), max_new_tokens=16, num_beams=beams)
        expected = tokenizer.decode(output[0], skip_special_tokens=True)
        options = ("--dtype", "float32", "--max-new-tokens", "16", "--beams", str(beams), "--threads", "1")
        assert good("generate", DEMO, "import ", *options).stdout.rstrip("\n") == expected.rstrip("\n")


@pytest.mark.parametrize("weight_dtype", ["int4", "int8"])
def test_generate_quantized(weight_dtype: str) -> None:
    options = ("--weight-dtype", weight_dtype, "--group-size", "32", "--scheme", "asym", "--compute-dtype", "int8")
    result = good("generate", "demo", "def main(", "--max-new-tokens", "8", *options)
    assert result.stdout.startswith("def main(") and "generated 8 tokens" in result.stderr


def test_a_seed_repeats_a_sample() -> None:
    def sample(seed: str) -> str:
        return good("generate", "x =", "-n", "16", "--temperature", "1.5", "--top-p", "0.95", "--seed", seed).stdout

    assert sample("1") == sample("1") != sample("2")


def test_new_tokens_stop_at_the_models_maximum() -> None:
    result = good("generate", "a = 1\n" * 255, "--max-new-tokens", "500")
    prompt = int(result.stderr.split("prompt ")[1].split()[0])
    assert f"generated {1024 - prompt} token" in result.stderr


def test_chat_feeds_new_tokens_only() -> None:
    result = good(
        "chat", "-n", "10", "--timings", stdin="def f(x):\n\nreturn\n/reset\n/nonsense\nclass A\n/exit\nnever\n"
    )
    costs = [line for line in result.stderr.splitlines() if "tokens cached" in line]
    assert len(costs) == 3 and "no chat template" in result.stderr and "no such command" in result.stderr
    assert "prompt 5 tokens" in costs[0] and "14 tokens cached" in costs[0]
    assert "prompt 2 tokens" in costs[1] and "25 tokens cached" in costs[1]
    assert "11 tokens cached" in costs[2]


def test_perplexity_as_text_and_json(tmp_path: Path) -> None:
    text = tmp_path / "a.py"
    text.write_text(Path(json.__file__).read_text())
    line = good("perplexity", "demo", "--text", str(text), str(text), "--window", "128").stdout
    found = json.loads(good("perplexity", DEMO, str(text), str(text), "--window", "128", "--json").stdout)
    assert f"perplexity {found['value']:.4f}" in line and found["window_length"] == 128 and 2 < found["value"] < 40
    assert found["weights"] == "weights as stored"
    held = json.loads(
        good("perplexity", "--demo-held-out", "--windows", "2", "--weight-dtype", "int8", "--json").stdout
    )
    assert held["windows"] == 2 and held["weights"].startswith("int8_sym_g128_bf16")


def test_a_quantized_model_loads_again(quantized: Path) -> None:
    fresh = good("generate", "demo", "def main(", "-n", "12", "--weight-dtype", "int4", "--group-size", "32").stdout
    assert good("generate", str(quantized), "def main(", "-n", "12").stdout == fresh
    stored = sum(file.stat().st_size for file in quantized.glob("*.safetensors"))
    assert stored < 0.65 * (demo_model_path() / "model.safetensors").stat().st_size


def test_quantize_replaces_only_with_force(quantized: Path) -> None:
    keep = quantized / "notes.txt"
    keep.write_text("mine")
    (quantized / "model-00001-of-00002.safetensors").write_text("stale")
    refused = run("quantize", "demo", str(quantized))
    assert refused.exit_code == 2 and "not empty" in refused.stderr
    good("quantize", "demo", str(quantized), "--group-size", "32", "--force")
    assert keep.read_text() == "mine" and not (quantized / "model-00001-of-00002.safetensors").exists()


@pytest.mark.parametrize("model", ["demo", "quantized"])
def test_bench_takes_the_demo_and_what_quantize_wrote(
    model: str, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "llmrt.llm.doctor.measured_peaks", lambda threads: dict.fromkeys(("read", "int8", "bf16", "fp32"))
    )
    name = str(quantized) if model == "quantized" else model
    options = ("-p", "4", "-n", "2", "--iters", "1", "--no-table", "--json", "-")
    settings = json.loads(good("bench", name, *options).stdout)["settings"]
    assert (settings["weight_dtype"], settings["group_size"]) == ("int4", 32 if model == "quantized" else 128)


def test_doctor_tells_the_tier() -> None:
    from llmrt import _C

    found = json.loads(good("doctor", "--no-measure", "--json").stdout)
    assert found["isa"]["in_use"] == _C.cpu_isa() and found["versions"]["torch"] == torch.__version__
    assert "measured" not in found and found["threads"]["torch"] >= 1
    assert found["isa"]["compiled"] == _C.compiled_cpu_isas().split(", ")
    text = good("doctor", "--no-measure").stdout
    assert all(tier in text for tier in found["isa"]["compiled"])


BAD = {
    "no prompt": (("generate",), "Missing argument"),
    "empty prompt": (("generate", ""), "the prompt is empty"),
    "model without prompt": (("generate", DEMO), "the prompt is missing"),
    "three words": (("generate", "demo", "a", "b"), "put the prompt in quotes"),
    "no such path": (("generate", "./none/such", "x"), "./none/such: no such directory"),
    "a file": (("generate", __file__, "x"), "is a file"),
    "no config": (("generate", str(Path(__file__).parent), "x"), "no config.json"),
    "unknown on the hub": (("generate", "no-such-model", "x"), "the Hugging Face hub failed"),
    "empty model": (("chat", ""), "MODEL is empty"),
    "bad dtype": (("generate", "x", "--dtype", "float8"), "'float8' is not one of"),
    "bad weight dtype": (("generate", "x", "--weight-dtype", "int5"), "'int5' is not one of"),
    "bad group size": (("generate", "x", "--weight-dtype", "int4", "--group-size", "7"), "group_size is 7"),
    "no threads": (("generate", "x", "--threads", "0"), "greater than or equal to 1"),
    "no beams": (("generate", "x", "--beams", "0"), "greater than or equal to 1"),
    "too long": (("generate", "x = 1\n" * 2000), "takes at most 1024"),
    "no text": (("perplexity", "demo"), "--text FILES or --demo-held-out"),
    "no such text": (("perplexity", "demo", "--text", "none.txt"), "none.txt: no such file"),
    "short text": (
        ("perplexity", "demo", "--text", str(demo_model_path() / "generation_config.json")),
        "one window needs",
    ),
    "long window": (("perplexity", "--demo-held-out", "--window", "2000"), "takes at most 1024"),
    "quantized twice": (("generate", "{quantized}", "x", "--weight-dtype", "int4"), "is quantized already"),
    "a path too long": (("generate", "m" * 5000, "x"), "the Hugging Face hub failed"),
    "a path with a null": (("generate", "./a\0b", "x"), "no such directory"),
    "onto itself": (("quantize", DEMO, DEMO), "OUT is MODEL itself"),
    "onto a file": (("quantize", DEMO, __file__), "is a file"),
    "scheme and fullrange": (
        ("quantize", DEMO, "out", "--weight-dtype", "int4_fullrange", "--scheme", "asym"),
        "fullrange",
    ),
    "system without template": (("chat", "--system", "Be brief."), "needs a chat template"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(
    arguments: tuple[str, ...], message: str, quantized: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run(*(str(quantized) if a == "{quantized}" else a for a in arguments))
    # rich breaks the lines of its boxes
    assert result.exit_code == 2 and message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_broken_weights_are_named(tmp_path: Path) -> None:
    for file in demo_model_path().glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 100)
    result = run("generate", str(tmp_path), "x")
    assert result.exit_code == 2 and "cannot be loaded" in result.stderr


@pytest.mark.parametrize("kv_dtype", ["int8", "float16"])
def test_kv_dtype(kv_dtype: str) -> None:
    result = good("generate", "def parse_args(", "--max-new-tokens", "6", "--kv-dtype", kv_dtype)
    assert "generated 6 tokens" in result.stderr
    text = good("perplexity", "--demo-held-out", "--windows", "1", "--window", "64", "--kv-dtype", kv_dtype).stdout
    assert f"weights as stored, {kv_dtype} cache" in text
    assert "valid" in run("generate", "x", "--dtype", "float32", "--kv-dtype", "bfloat16").stderr


def test_every_format_has_an_option() -> None:
    assert {w.value for w in WeightDType} == {*FORMATS, "none"}
    assert {w.value for w in StoredDType} == {*FORMATS, "int4_fullrange"}


@pytest.mark.parametrize("weights", ["nf4", "fp4_e2m1", "fp8_e4m3", "fp8_e5m2"])
def test_quantized_as(weights: str, tmp_path: Path) -> None:
    scales = ["--scale-dtype", "e8m0"] if weights == "fp8_e4m3" else []
    made = good("quantize", "demo", str(tmp_path / "q"), "--weight-dtype", weights, "--group-size", "64", *scales)
    assert f"{weights}_sym_g64_{'e8m0' if scales else 'bf16'}" in made.stdout
    assert good("generate", str(tmp_path / "q"), "def parse_args(", "--max-new-tokens", "5").stdout.startswith(
        "def parse"
    )
