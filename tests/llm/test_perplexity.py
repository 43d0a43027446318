"""Quantized products are as good as their arithmetic allows: perplexity of the trained demo model on files it has not seen.

Every fourth of the 120 windows of the demo model's README; `llmrt perplexity --demo-held-out` takes all.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrt import llm
from llmrt.llm.demo import demo_model_path, held_out_files, library_files
from llmrt.llm.perplexity import perplexity, token_windows

EXACT_3_11 = 17.2356  # float32, every fourth window of the library of Python 3.11


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def windows(tokenizer: Any) -> Tensor:
    return token_windows(tokenizer, (f.read_text("utf-8", errors="ignore") for f in held_out_files()), 512, 120)[::4]


def demo(dtype: torch.dtype = torch.bfloat16) -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=dtype)


def calibration_windows(tokenizer: Any) -> Tensor:
    """Return windows of files that the model was trained on."""
    files = library_files()[0][::40]
    return token_windows(tokenizer, (f.read_text("utf-8", errors="ignore") for f in files), 512, 8)


@pytest.fixture(scope="module")
def baseline(windows: Tensor) -> float:
    """The model as stored, in plain transformers."""
    return perplexity(demo(), windows).value


def test_the_model_predicts_its_held_out_files(windows: Tensor, baseline: float) -> None:
    """Plain and optimized in bf16; the absolute figure depends on the library."""
    exact = perplexity(demo(torch.float32), windows).value
    if sys.version_info[:2] == (3, 11):
        assert exact == pytest.approx(EXACT_3_11, rel=2e-3)
    assert baseline == pytest.approx(exact, rel=2e-3)
    assert perplexity(llm.optimize(demo(), dtype=torch.bfloat16), windows).value == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"weight_dtype": "int8", "group_size": -1}, 0.003),
        ({"weight_dtype": "int8", "group_size": 128}, 0.003),
        ({"weight_dtype": "int4", "group_size": 32}, 0.015),
        ({"weight_dtype": "int4", "group_size": 128}, 0.02),
        ({"weight_dtype": "int4", "group_size": 32, "scheme": "asym"}, 0.01),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_int8_compute_keeps_the_perplexity(
    options: dict[str, Any], bound: float, windows: Tensor, baseline: float
) -> None:
    config = llm.WeightOnlyQuantConfig(compute_dtype="int8", lm_head=False, **options)
    model = llm.optimize(demo(), dtype=torch.bfloat16, quantization_config=config, strict=True)
    ratio = perplexity(model, windows).value / baseline
    assert abs(ratio - 1) < bound, f"{ratio - 1:+.4%}"


def test_static_int8_keeps_the_perplexity(windows: Tensor, tokenizer: Any, baseline: float, tmp_path: Path) -> None:
    config = llm.StaticQuantConfig(alpha="auto")
    prepared = llm.optimize(demo(), quantization_config=config)
    with torch.no_grad():
        for window in calibration_windows(tokenizer):
            prepared(window[None])
    llm.save_qconf_summary(prepared, tmp_path / "q.json")
    model = llm.optimize(
        demo(), dtype=torch.bfloat16, quantization_config=config, qconfig_summary_file=tmp_path / "q.json", strict=True
    )
    ratio = perplexity(model, windows).value / baseline
    assert abs(ratio - 1) < 0.01, f"{ratio - 1:+.4%}"


@pytest.mark.parametrize("kv_dtype", ["int8", "float16"])
def test_a_smaller_cache_keeps_the_perplexity(kv_dtype: str, windows: Tensor) -> None:
    exact = perplexity(llm.optimize(demo(), dtype=torch.bfloat16), windows, cached=True).value
    ratio = (
        perplexity(llm.optimize(demo(), dtype=torch.bfloat16, kv_dtype=kv_dtype), windows, cached=True).value / exact
    )
    assert 0 < abs(ratio - 1) < 0.001, f"{ratio - 1:+.4%}"


def test_windows_join_texts_between_bos_and_eos(tokenizer: Any) -> None:
    texts = ["import os\n" * 20, "x = 1\n" * 20]
    joined = [t for text in texts for t in (0, *tokenizer(text, add_special_tokens=False)["input_ids"], 1)]
    found = token_windows(tokenizer, texts, length=16)
    assert found.flatten().tolist() == joined[: len(joined) // 16 * 16]
    assert torch.equal(token_windows(tokenizer, texts, length=16, limit=2), found[:2])


def test_perplexity_is_exp_of_the_mean_loss(windows: Tensor) -> None:
    model, seen = demo(torch.float32), []
    with torch.no_grad():
        loss = torch.stack([model(w[None], labels=w[None]).loss for w in windows[:2, :64]]).mean()
    result = perplexity(model, windows[:2, :64], lambda done, value: seen.append((done, value)))
    assert result.value == pytest.approx(loss.exp().item(), rel=1e-5)
    assert result.predicted_tokens == 2 * 63 and [done for done, _ in seen] == [1, 2] and seen[1][1] == result.value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1,), "window length is 1"), ((16, 0), "number of windows is 0"), ((512,), "one window needs 512")],
)
def test_bad_windows(tokenizer: Any, arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_windows(tokenizer, ["import os"], *arguments)


def test_held_out_files_are_apart_from_training() -> None:
    training, held_out = library_files()
    assert len(training) > 10 * len(held_out) > 100 and not set(training) & set(held_out)
