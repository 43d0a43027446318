"""Calibration text, its errors, AutoRound's results, and the command line with a calibrating method."""

from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import TOKENS, config
from models import VOCAB, tiny_model
from test_cli import good, run

from llmrt import llm
from llmrt.llm.algorithms.autoround import on_grid
from llmrt.llm.algorithms.calibration import calibration_samples
from llmrt.llm.algorithms.walk import Walk
from llmrt.llm.demo import demo_model_path, held_out_files, library_files
from llmrt.llm.linear import Scheme, quantized
from llmrt.ops.formats import Layout, dequantize

DEMO = str(demo_model_path())


@pytest.fixture(scope="module")
def demo() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO)


def text_config(calibration: Any, **options: Any) -> llm.WeightOnlyQuantConfig:
    return config("gptq", calibration=calibration, **{"samples": 5, "sequence_length": 16, **options})


def test_a_file_is_cut_into_windows_of_its_tokens(demo: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = "\n".join(f"def f{i}(x): return x + {i}" for i in range(100))
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    found = calibration_samples(demo, text_config(str(file)))
    assert str(found) == "5 samples of 16 tokens from text.txt"
    joined = [0, *tokenizer(text)["input_ids"], 1]
    windows = {tuple(joined[i : i + 16]) for i in range(0, 5 * 4 * 16, 16)}
    drawn = {tuple(t[0].tolist()) for t in found.tokens}
    assert len(drawn) == 5 and drawn <= windows
    same = calibration_samples(demo, text_config(file))
    other = calibration_samples(demo, text_config(file, seed=1))
    texts = calibration_samples(demo, text_config([text], tokenizer=tokenizer))
    assert all(torch.equal(a, b) for a, b in zip(found.tokens, same.tokens, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found.tokens, texts.tokens, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found.tokens, other.tokens, strict=True))


def test_the_built_in_text_has_no_held_out_file(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrt.llm.algorithms import calibration

    read: list[Path] = []
    whole = calibration._read
    monkeypatch.setattr(calibration, "_read", lambda path, n: read.append(path) or whole(path, n))
    found = calibration_samples(demo, text_config(None))
    assert len(found.tokens) == 5 and read and set(read) <= set(library_files()[0])
    assert not set(read) & set(held_out_files())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "/no/such/file"}, "calibration is '/no/such/file': there is no such file"),
        ({"calibration": []}, "a list without text"),
        ({"calibration": ["", ""]}, "a list without text"),
        ({"calibration": 7}, "calibration is a int; valid: a text file's path"),
        ({"calibration": ["x = 1"]}, "calibration text from 1 given texts is too short: the texts have 5 tokens"),
        ({"calibration": ["x = 1"], "sequence_length": 2000}, "sequence_length is 2000; this model takes at most 1024"),
        ({"calibration": [torch.tensor([3, 4096])]}, "token ids from 3 to 4096; the model has 0 to 4095"),
        ({"calibration": [torch.tensor([3, -1])]}, "token ids from -1 to 3"),
        ({"calibration": [torch.tensor([3])]}, r"calibration\[0\] is torch.int64 \[1, 1\]"),
        ({"calibration": [torch.zeros(2, 5).long()]}, r"calibration\[0\] is torch.int64 \[2, 5\]"),
        ({"calibration": [TOKENS[0], [0.5, 1.0]]}, r"calibration\[1\] is torch.float32"),
        ({"calibration": [{}]}, r"calibration\[0\] is no row of token ids"),
        ({"calibration": None, "tokenizer": 5}, "tokenizer is a int"),
        ({"calibration": None, "tokenizer": "/no/such/directory"}, "'/no/such/directory' has none"),
    ],
    ids=str,
)
def test_bad_calibration(options: dict[str, Any], message: str, demo: Any) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_samples(demo, text_config(**options))


def test_a_model_without_a_tokenizer_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"the model has no name_or_path .* pass tokenizer="):
        llm.optimize(tiny_model("llama"), quantization_config=text_config(["x = 1\n" * 100]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "hqq"}, "method is 'hqq'; valid: 'rtn', 'gptq', 'awq', 'autoround'"),
        ({"samples": 0}, "samples is 0; valid: an integer, at least 1"),
        ({"sequence_length": 1}, "sequence_length is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"act_order": 1}, "act_order is 1; valid: True, False"),
        ({"damping": 2.0}, "damping is 2.0; valid: 0 to 1"),
    ],
    ids=str,
)
def test_values_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.WeightOnlyQuantConfig(**options)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_activations_that_are_not_finite(method: str) -> None:
    import copy

    model = copy.deepcopy(tiny_model("llama"))
    model.model.layers[1].input_layernorm.weight[3] = torch.inf
    with pytest.raises(ValueError, match=r"model\.layers\.1.*NaN or infinite"):
        llm.optimize(model, quantization_config=config(method))


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_read_back_from_a_rounded_weight(asymmetric: bool, dtype: torch.dtype) -> None:
    scheme = Scheme(Layout("int4", asymmetric, 32, torch.float32), "fp32", fullrange=not asymmetric)
    part = quantized(torch.randn(12, 72), scheme)
    weight = dequantize(*part, scheme.layout, 72).to(dtype)
    zero = part.zeros.float() if part.zeros is not None else 8
    got = on_grid(weight, part.scales.flatten(), zero, scheme)
    for mine, theirs in zip(got, part, strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("scale", "zero", "message"),
    [
        (torch.ones(5), 8, "scales have 5 values; expected 4 x 2"),
        (torch.ones(8), 7, "zero points go from 7.0 to 7.0"),
        (torch.ones(8), torch.ones(3), "zero points have 3 values"),
        (torch.ones(8), 8, "a weight lies 0.30 steps off the grid of int4_sym_g32_f32"),
    ],
)
def test_a_weight_off_its_grid(scale: torch.Tensor, zero: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_grid(torch.full((4, 64), 1.3), scale, zero, Scheme(Layout("int4", False, 32, torch.float32), "fp32"))


def test_autoround_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "auto_round", None)
    with pytest.raises(ValueError, match="pip install auto-round"):
        llm.optimize(tiny_model("llama"), quantization_config=config("autoround"))


def test_autoround() -> None:
    pytest.importorskip("auto_round")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.2, **sizes)).eval()
    fast = llm.optimize(plain, quantization_config=config("autoround", group_size=32))
    near = llm.optimize(plain, quantization_config=config("rtn", group_size=32))
    assert not [e for e in fast.optimization_report.entries if e.kind == "calibration" and e.by is None]
    ids, exact = torch.stack(TOKENS), plain(torch.stack(TOKENS)).logits
    errors = [(m(ids).logits - exact).square().mean() for m in (fast, near)]
    assert errors[0] < errors[1]
    with pytest.raises(ValueError, match="multiples of 32"):
        llm.optimize(tiny_model("llama"), quantization_config=config("autoround"))


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("import os\nprint(os.getcwd())\n" * 60)
    options = ("--calibration", str(text), "--samples", "2", "--sequence-length", "32", "--group-size", "64")
    result = good("quantize", "demo", str(out), "--method", "gptq", "--no-act-order", *options)
    assert "int4_sym_g64_bf16" in result.stdout and (out / "model.safetensors").is_file()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert good("generate", str(out), "import ", "--max-new-tokens", "2").stdout.startswith("import ")
    missing = run("quantize", "demo", str(tmp_path / "no"), "--method", "awq", "--calibration", str(tmp_path / "none"))
    assert missing.exit_code == 2 and "there is no such file" in missing.output

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Walk, "finish", interrupted)
    stopped = run("quantize", "demo", str(tmp_path / "half"), "--method", "gptq", *options)
    assert stopped.exit_code != 0 and sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.txt"]
