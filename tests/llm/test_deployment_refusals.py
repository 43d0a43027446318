"""What deployment mode cannot run as a graph: it is noticed, said once, and the modules run."""

import copy
import warnings
from typing import Any

import pytest
import torch
from models import VOCAB, padded_batch, tiny_model
from torch import nn

from llmrt import llm

GENERATE = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(autouse=True)
def no_warning() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="llmrt:")
        yield


class Peek(nn.Module):
    """A norm that looks at values, or keeps a tensor."""

    def __init__(self, norm: nn.Module, keeps: bool) -> None:
        super().__init__()
        self.norm, self.keeps, self.last = norm, keeps, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.keeps:
            self.last = x
        elif x.abs().max() > 1e9:
            return x
        return self.norm(x)


@pytest.mark.parametrize("keeps", [False, True], ids=["looks", "keeps"])
def test_what_cannot_be_captured_runs_and_says_so_once(keeps: bool) -> None:
    fast, slow = (llm.optimize(tiny_model("llama"), deployment_mode=mode) for mode in (True, False))
    batch = padded_batch()
    expected = slow.generate(**batch, **GENERATE)
    fast.model.norm = Peek(fast.model.norm, keeps)
    with pytest.warns(
        UserWarning, match=r"could not run as a graph \((its forward changes Peek.last|.*data-dep)"
    ) as seen:
        assert torch.equal(fast.generate(**batch, **GENERATE), expected)
    assert len(seen) == 1 and not fast.forward.graphs
    assert "  captured graphs:\n    all: modules run: " in str(fast.optimization_report)
    last = fast.model.norm.last
    assert (type(last) is torch.Tensor) if keeps else last is None
    strict = llm.optimize(tiny_model("llama"), strict=True)
    strict.model.norm = Peek(strict.model.norm, keeps)
    with pytest.raises(RuntimeError, match="could not run as a graph"):
        strict.generate(**batch, **GENERATE)


class Deceived(nn.Module):
    """A norm that asks for the type of a size: a graph would take the other way."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) if type(x.shape[1]) is int else -self.norm(x)


def test_a_graph_that_computes_something_else_is_found_out() -> None:
    fast, slow = (llm.optimize(tiny_model("llama"), deployment_mode=mode) for mode in (True, False))
    batch = padded_batch()
    fast.model.norm = Deceived(fast.model.norm)
    with pytest.warns(UserWarning, match=r"\(its logits differ by 2.0e\+00 in a trial run\)"):
        got = fast.generate(**batch, **GENERATE)
    assert torch.equal(got, slow.generate(**batch, **GENERATE))
    assert fast.forward.graph(lambda key: not key.one_token) is None
    assert fast.forward.graphs == [fast.forward.graph(lambda key: key.one_token)]  # there it is a number


def test_errors_are_those_of_the_modules() -> None:
    fast = llm.optimize(tiny_model("opt"))
    with pytest.raises(ValueError, match="the sequence is too long: the model's position table has 1"):
        fast.generate(torch.randint(3, VOCAB, (1, 125)), max_new_tokens=8)
    assert len(fast.forward.graphs) == 2
    cache = llm.KVCache(fast.config)
    fast(torch.randint(3, VOCAB, (2, 5)), past_key_values=cache)
    with pytest.raises(ValueError, match="batch 1, holds 2"):
        fast(torch.randint(3, VOCAB, (1, 1)), past_key_values=cache)
    with pytest.raises(ValueError, match="filled by another model"):
        llm.optimize(tiny_model("opt"))(torch.randint(3, VOCAB, (2, 1)), past_key_values=cache)
    with pytest.raises(IndexError):
        fast(torch.tensor([[VOCAB]]), past_key_values=llm.KVCache(fast.config))
    assert cache.get_seq_length() == 5 and not fast.forward.reasons


def test_rotations_that_change_are_reported() -> None:
    plain = copy.deepcopy(tiny_model("llama"))
    plain.config.rope_parameters = {**plain.config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    report = llm.optimize(plain).optimization_report
    (entry,) = report.unoptimized
    assert entry.kind == "forward" and entry.reason == "its rotation (dynamic) changes with the length of the text"
    with pytest.raises(llm.OptimizationError, match=r"its rotation \(dynamic\)"):
        llm.optimize(plain, strict=True)
    llm.optimize(plain, strict=True, deployment_mode=False)
