"""A conversation gives what one long prompt gives, and feeds the model only what its cache lacks."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrt import llm
from llmrt.llm.chat import ChatSession
from llmrt.llm.demo import demo_model_path
from llmrt.llm.timing import generate_timed

TEMPLATE = "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}# assistant\n{% endif %}"
# Answers of earlier turns are shortened, as templates do that drop a model's thinking: the cached prefix ends there.
SHORTENING = TEMPLATE.replace("{{ m.content }}", "{{ m.content[:12] if m.role == 'assistant' else m.content }}")


@pytest.fixture(scope="module", params=["plain", "optimized"])
def model(request: pytest.FixtureRequest) -> Any:
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    return model if request.param == "plain" else llm.optimize(model, dtype=torch.float32)


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.mark.parametrize("template", [None, TEMPLATE, SHORTENING], ids=["completion", "template", "shortening"])
def test_turns_equal_one_long_prompt(model: Any, tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template
    session = ChatSession(model, tokenizer, max_new_tokens=20, do_sample=False)
    for turn, message in enumerate(["def read(path):", "class Reader:", "import os"]):
        tokens = session.prompt_tokens(message)
        before = session.cached_tokens
        answer, timings = session.send(message)
        expected, _ = generate_timed(model, torch.tensor([tokens]), max_new_tokens=20, do_sample=False)
        assert answer == tokenizer.decode(expected[0, len(tokens) :], skip_special_tokens=True)
        if template is SHORTENING and turn:
            assert len(tokens) - before < timings.prompt_tokens < len(tokens)
        else:
            assert timings.prompt_tokens == len(tokens) - before
        assert session.cached_tokens == len(tokens) + timings.generated_tokens - 1


def test_reset_forgets(model: Any, tokenizer: Any) -> None:
    session = ChatSession(model, tokenizer, max_new_tokens=8, do_sample=False)
    first, _ = session.send("def read(path):")
    session.reset()
    assert session.cached_tokens == 0 and session.send("def read(path):")[0] == first


def test_bad_messages(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="the message is empty"):
        ChatSession(model, tokenizer).send("")
    with pytest.raises(ValueError, match="needs a chat template"):
        ChatSession(model, tokenizer, system="Be brief.")
    with pytest.raises(ValueError, match="at least one token"):
        generate_timed(model, torch.empty((1, 0), dtype=torch.int64))


@pytest.mark.parametrize("beams", [1, 3])
def test_timings_count_steps(model: Any, tokenizer: Any, beams: int) -> None:
    tokens = tokenizer("import ", return_tensors="pt").input_ids
    output, timings = generate_timed(
        model, tokens, max_new_tokens=7, min_new_tokens=7, num_beams=beams, do_sample=False
    )
    assert output.shape[1] == tokens.shape[1] + 7
    assert (timings.prompt_tokens, timings.generated_tokens) == (tokens.shape[1], 7)
    assert timings.prompt_rate > 0 and timings.step_rate is not None and timings.step_rate > 0
    assert str(timings).startswith(f"prompt {tokens.shape[1]} token") and "generated 7 tokens" in str(timings)
