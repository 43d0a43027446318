"""Greedy search by llmrt's loop gives what transformers' loop gives, for every kind of call, and runs only where it may."""

import copy
import inspect
from typing import Any

import pytest
import torch
from models import padded_batch, tiny_model
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, MaxTimeCriteria, StoppingCriteriaList
from transformers.generation import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from llmrt import llm
from llmrt.llm.greedy import GreedySearch, Steps

BATCH = padded_batch()
ONE = {"input_ids": BATCH["input_ids"][:1]}
GREEDY = {"max_new_tokens": 9, "do_sample": False}


class Tokens(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: Any) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


class Watch(StoppingCriteria):
    """Notes the sequences and stops a row whose last token is below a number."""

    def __init__(self, below: int = 0) -> None:
        self.below = below
        self.seen: list[Any] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.seen.append(input_ids.tolist())
        return input_ids[:, -1] < self.below


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """The same model with llmrt's loop and with transformers'."""
    plain = tiny_model("llama")
    return llm.optimize(plain), llm.optimize(plain, deployment_mode=False)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every step that ran with a kept graph."""
    rows: list[int] = []
    run = Steps._run

    def counted(self: Steps, tokens: Any, start: int) -> Any:
        rows.append(tokens.shape[0])
        return run(self, tokens, start)

    monkeypatch.setattr(Steps, "_run", counted)
    return rows


def ends(model: Any, inputs: Any) -> list[int]:
    """Return tokens that the rows generate at different times."""
    new = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    return [int(row[4 - 2 * i]) for i, row in enumerate(new)]


@pytest.mark.parametrize("inputs", [ONE, BATCH], ids=["one", "batch"])
@pytest.mark.parametrize("kind", ["plain", "ends", "dict", "criteria", "time", "no mask"])
def test_same_tokens(models: tuple[Any, Any], runs: list[int], inputs: dict[str, Any], kind: str) -> None:
    fast, slow = models
    results = []
    for model in (slow, fast):
        options: dict[str, Any] = dict(GREEDY)
        watch = Watch(below=20 if kind == "criteria" else 0)
        if kind == "ends":
            options["eos_token_id"] = ends(slow, inputs)
        if kind in ("dict", "criteria"):
            options |= {"return_dict_in_generate": True, "stopping_criteria": StoppingCriteriaList([watch])}
        if kind == "time":
            options |= {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(1e9)]), "max_length": None}
        given = {"input_ids": inputs["input_ids"]} if kind == "no mask" else inputs
        runs.clear()
        results.append((model.generate(**given, **options), watch.seen))
    (expected, seen), (got, watched) = results
    if kind in ("dict", "criteria"):
        assert type(got) is type(expected) and watched == seen
        assert list(got) == list(expected) and got.past_key_values.get_seq_length() == len(watched[-1][0]) - 1
        expected, got = expected.sequences, got.sequences
    assert torch.equal(got, expected) and got.is_contiguous()
    made = got.shape[1] - inputs["input_ids"].shape[1]
    assert made == 9 if kind not in ("ends", "criteria") else made < 9
    assert len(runs) == max(0, made - 2), "all steps but the first one"


@pytest.mark.parametrize("inputs", [ONE, BATCH], ids=["one", "batch"])
def test_streamers_get_the_same(models: tuple[Any, Any], runs: list[int], inputs: dict[str, Any]) -> None:
    seen = []
    for model in models:
        streamer = Tokens()
        model.generate(**inputs, **GREEDY, streamer=streamer, eos_token_id=ends(models[1], inputs))
        seen.append(streamer.seen)
    assert seen[0] == seen[1] and seen[0][-1] == "end" and runs


def test_a_cache_that_grows_and_goes_on(models: tuple[Any, Any], runs: list[int]) -> None:
    texts = []
    for model in models:
        cache = llm.KVCache(model.config, max_length=13)
        first = model.generate(**ONE, **GREEDY, past_key_values=cache)
        longer = torch.cat([first, first[:, :3]], 1)
        texts.append(model.generate(longer, **(GREEDY | {"max_new_tokens": 70}), past_key_values=cache))
    assert torch.equal(*texts) and texts[0].shape[1] == 20 + 3 + 70 and len(runs) == 7 + 68


def test_what_the_model_says_in_its_generation_config(models: tuple[Any, Any], runs: list[int]) -> None:
    fast, slow = copy.deepcopy(models[0]), models[1]
    fast.generation_config.do_sample = True
    fast.generate(**ONE, max_new_tokens=4)
    assert not runs
    config = GenerationConfig(**GREEDY, pad_token_id=0)
    assert torch.equal(fast.generate(ONE["input_ids"], generation_config=config), slow.generate(**ONE, **GREEDY))
    assert len(runs) == 7


class Largest(LogitsProcessor):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores.clamp(max=1)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"output_scores": True, "return_dict_in_generate": True},
        {"repetition_penalty": 1.3},
        {"logits_processor": LogitsProcessorList([Largest()])},
        {"past_key_values": DynamicCache},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_calls_run_transformers_loop(models: tuple[Any, Any], runs: list[int], options: dict[str, Any]) -> None:
    results = []
    for model in models:
        torch.manual_seed(0)
        given = {key: value() if value is DynamicCache else value for key, value in options.items()}
        out = model.generate(**ONE, **{**GREEDY, **given})
        results.append(out if isinstance(out, torch.Tensor) else out.sequences)
    assert torch.equal(*results) and not runs


def test_hooks_fire_at_every_token(models: tuple[Any, Any], runs: list[int]) -> None:
    calls: list[int] = []
    handle = models[0].register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        assert torch.equal(models[0].generate(**ONE, **GREEDY), models[1].generate(**ONE, **GREEDY))
    finally:
        handle.remove()
    assert len(calls) == 9 and not runs


def test_errors_are_transformers_own(models: tuple[Any, Any]) -> None:
    for model in models:
        with pytest.raises(ValueError, match="streamer"):
            model.generate(**ONE, **GREEDY, num_beams=2, streamer=Tokens())
        with pytest.raises(ValueError, match="maximal"):
            model.generate(**ONE, **GREEDY, maximal=2)
    assert inspect.signature(models[0].generate) == inspect.signature(models[1].generate)


def test_a_graph_that_fails_leaves_the_step_to_the_modules(models: tuple[Any, Any], runs: list[int]) -> None:
    fast, slow = copy.deepcopy(models[0]), models[1]
    expected = slow.generate(**BATCH, **GREEDY)
    assert torch.equal(fast.generate(**BATCH, **GREEDY), expected)

    def fail(*args: Any) -> Any:
        raise RuntimeError("no")

    for graph in fast.forward.graphs:
        graph.run = fail
    with pytest.warns(UserWarning, match="could not run as a graph"):
        assert torch.equal(fast.generate(**BATCH, **GREEDY), expected)
    assert len(fast.forward.reasons) == 1


def test_models_whose_forward_takes_other_arguments(runs: list[int]) -> None:
    plain = tiny_model("opt")  # no position_ids
    fast, slow = llm.optimize(plain), llm.optimize(plain, deployment_mode=False)
    for inputs in (ONE, BATCH):
        assert torch.equal(fast.generate(**inputs, **GREEDY), slow.generate(**inputs, **GREEDY))
    assert len(runs) == 14
    fast.prepare_inputs_for_generation = lambda ids, **kwargs: {  # a foreign argument
        **type(fast).prepare_inputs_for_generation(fast, ids, **kwargs), "output_attentions": False,
    }  # fmt: skip
    runs.clear()
    assert torch.equal(fast.generate(**ONE, **GREEDY), slow.generate(**ONE, **GREEDY)) and not runs


def test_generate_hands_the_loop_what_its_own_gets() -> None:
    parameters = inspect.signature(GreedySearch()).parameters
    usual = inspect.signature(type(tiny_model("llama"))._sample).parameters
    assert set(parameters) - {"model"} <= set(usual)
