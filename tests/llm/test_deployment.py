"""Deployment mode: graphs run instead of the modules, give the same results, and step back where they do not fit."""

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from models import MODELS, VOCAB, CountOperators, error, padded_batch, tiny_model
from torch import nn
from transformers import DynamicCache
from transformers.generation import LogitsProcessor, LogitsProcessorList

from llmrt import llm

GENERATE = {"max_new_tokens": 8, "do_sample": False}
INT8 = {"weight_dtype": "int8", "compute_dtype": "fp32", "group_size": 16}


@pytest.fixture(autouse=True)
def no_warning() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="llmrt:")
        yield


def both(name: str, **options: Any) -> tuple[Any, Any]:
    plain = tiny_model(name)
    return llm.optimize(plain, **options), llm.optimize(plain, deployment_mode=False, **options)


def layer_class(model: Any) -> Any:
    return next(type(m) for m in model.modules() if type(m).__name__.endswith(("DecoderLayer", "Block", "NeoXLayer")))


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_graphs_and_modules_agree(name: str, quantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = both(name, quantization_config=llm.WeightOnlyQuantConfig(**INT8) if quantized else None)
    batch = padded_batch()
    alone = {"input_ids": batch["input_ids"][:1]}
    calls = [(alone, {}), (batch, {}), (batch, {"num_beams": 3})]
    expected = [slow.generate(**inputs, **GENERATE, **options) for inputs, options in calls]
    first = [fast.generate(**inputs, **GENERATE, **options) for inputs, options in calls]
    graphs = len(fast.forward.graphs)
    assert graphs == 5 and not fast.forward.reasons  # a prompt and three steps; beams read their prompt as rows do
    logits = slow(**batch, past_key_values=llm.KVCache(slow.config))
    out = fast(**batch, past_key_values=llm.KVCache(fast.config))
    assert type(out) is type(logits) and list(out) == list(logits)
    assert isinstance(out.past_key_values, llm.KVCache) and out.past_key_values.get_seq_length() == 11
    assert error(out.logits, logits.logits, batch["attention_mask"]) < 1e-5
    assert len(fast.optimization_report.graphs) == 6 and "padding, all logits" in fast.optimization_report.graphs[-1]

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a module ran")

    monkeypatch.setattr(layer_class(fast), "forward", refuse)
    again = [fast.generate(**inputs, **GENERATE, **options) for inputs, options in calls]
    for one, two, three in zip(expected, first, again, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    with pytest.raises(AssertionError, match="a module ran"):
        slow(**batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_inference_mode(dtype: torch.dtype) -> None:
    fast, slow = both("qwen3", dtype=dtype)
    batch = padded_batch()
    with torch.inference_mode():
        assert torch.equal(fast.generate(**batch, **GENERATE), slow.generate(**batch, **GENERATE))
    assert torch.equal(fast.generate(**batch, **GENERATE), slow.generate(**batch, **GENERATE))
    assert len(fast.forward.graphs) == 2


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return both("mistral")


def test_lengths_and_sizes_need_no_new_graph(pair: tuple[Any, Any]) -> None:
    fast, slow = (copy.deepcopy(model) for model in pair)
    for tokens in (2, 3, 9, 17, 40):
        for batch in (1, 2, 5):
            ids = torch.randint(3, VOCAB, (batch, tokens))
            assert torch.equal(fast.generate(ids, **GENERATE), slow.generate(ids, **GENERATE))
    assert len(fast.forward.graphs) == 4
    ids = ids[:1, :1]
    assert torch.equal(fast.generate(ids, **GENERATE), slow.generate(ids, **GENERATE))
    assert len(fast.forward.graphs) == 4  # an empty cache and one token


def test_a_prompt_is_read_once_for_all_of_its_beams(pair: tuple[Any, Any]) -> None:
    fast, slow = (copy.deepcopy(model) for model in pair)
    rows: list[int] = []

    class Rows(CountOperators):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.llmrt.attention.default:
                rows.append(args[0].shape[0])
            return super().__torch_dispatch__(func, types, args, kwargs)

    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}):
        for inputs in (padded_batch(), {"input_ids": padded_batch()["input_ids"][:1]}):
            options = {**GENERATE, **options, "max_new_tokens": 3}
            torch.manual_seed(1)
            expected = slow.generate(**inputs, **options)
            for _ in range(2):  # the first call compares graphs with modules
                rows.clear()
                torch.manual_seed(1)
                with Rows():
                    assert torch.equal(fast.generate(**inputs, **options), expected)
            batch, layers = len(inputs["input_ids"]), fast.config.num_hidden_layers
            assert rows == [batch] * layers + [3 * batch] * 2 * layers
    ids = torch.randint(3, VOCAB, (3, 5))  # different prompts in a cache for beams: its first rows' keys serve all
    one, two = (model(ids, past_key_values=llm.KVCache(model.config, beams=3)).logits for model in (fast, slow))
    assert torch.equal(one, two)


def test_masks_of_ones_need_no_mask(pair: tuple[Any, Any]) -> None:
    fast = copy.deepcopy(pair[0])
    ids = torch.randint(3, VOCAB, (2, 9))
    without = fast(ids, past_key_values=llm.KVCache(fast.config)).logits
    given = fast(ids, attention_mask=torch.ones_like(ids), past_key_values=llm.KVCache(fast.config)).logits
    assert torch.equal(without, given) and len(fast.forward.graphs) == 1


def test_a_cache_goes_from_modules_to_graphs_and_back(pair: tuple[Any, Any]) -> None:
    fast, slow = pair
    ids = torch.randint(3, VOCAB, (2, 20))
    expected = slow(ids, past_key_values=llm.KVCache(slow.config)).logits
    cache, outs = llm.KVCache(fast.config, max_length=7), []
    for start, end, options in (
        (0, 6, {}), (6, 7, {"output_hidden_states": True}), (7, 8, {}), (8, 12, {"output_hidden_states": True}), (12, 20, {}),
    ):  # fmt: skip
        out = fast(ids[:, start:end], past_key_values=cache, **options)
        assert (out.hidden_states is not None) == bool(options)
        outs.append(out.logits)
    assert error(torch.cat(outs, 1), expected) < 1e-5
    cache.crop(-5)
    cache.batch_repeat_interleave(2)
    repeated = fast(ids[:, 15:].repeat_interleave(2, 0), past_key_values=cache).logits
    assert error(repeated, expected[:, 15:].repeat_interleave(2, 0)) < 1e-5


def test_what_the_modules_run(pair: tuple[Any, Any]) -> None:
    fast = copy.deepcopy(pair[0])
    batch, ids = padded_batch(), padded_batch()["input_ids"]
    ours = lambda: llm.KVCache(fast.config)  # noqa: E731
    whole = torch.ones(3, 1, 11, 11, dtype=torch.bool).tril()
    for options in (
        {},
        {"past_key_values": DynamicCache(config=fast.config)},
        {"past_key_values": ours(), "labels": ids},
        {"past_key_values": ours(), "attention_mask": whole},
        {"past_key_values": ours(), "logits_to_keep": torch.tensor([1, 4])},
        {"past_key_values": ours(), "output_hidden_states": True},
    ):
        fast(ids, **options)
    with torch.enable_grad():
        fast(ids, past_key_values=ours())
    with torch.autocast("cpu", torch.bfloat16):
        fast(ids, past_key_values=ours())
    assert isinstance(fast(ids, past_key_values=ours(), return_dict=False), tuple)
    assert not fast.forward.graphs and not fast.forward.reasons
    fast.config.use_cache = False
    fast(ids, past_key_values=ours())
    assert not fast.forward.graphs
    fast.config.use_cache = True
    seen = []
    handle = fast.model.layers[1].mlp.register_forward_hook(lambda *call: seen.append(call))
    fast.generate(**batch, **GENERATE)
    assert len(seen) == 8 and not fast.forward.graphs
    handle.remove()
    fast.generate(**batch, **GENERATE)
    assert len(seen) == 8 and len(fast.forward.graphs) == 2


def test_a_changed_model_is_captured_anew(pair: tuple[Any, Any]) -> None:
    fast, slow = (copy.deepcopy(model) for model in pair)
    batch = padded_batch()

    def check(graphs: int) -> None:
        assert torch.equal(fast.generate(**batch, **GENERATE), slow.generate(**batch, **GENERATE))
        cache = llm.KVCache(fast.config), llm.KVCache(slow.config)
        a, b = (m(**batch, past_key_values=c).logits for m, c in zip((fast, slow), cache, strict=True))
        assert error(a, b, batch["attention_mask"]) < 1e-5
        assert len(fast.forward.graphs) == graphs and fast.dtype == a.dtype

    check(3)
    for model in (fast, slow):
        model.lm_head.weight.data.mul_(-1)  # in place: the graphs see it
    before = fast.forward.graphs[0]
    check(3)
    assert fast.forward.graphs[0] is before
    replaced = nn.Parameter(torch.randn_like(fast.lm_head.weight), False)
    for model in (fast, slow):
        model.lm_head.weight = replaced
    check(3)
    assert fast.forward.graphs[0] is not before
    for model in (fast, slow):
        model.model.layers[0].mlp = nn.Identity()
    check(3)
    for model in (fast, slow):
        model.bfloat16()
    check(3)
    for model in (fast, slow):
        model.set_attn_implementation("sdpa")
    check(0)
    assert fast.forward.reasons == ["the attention implementation was changed"]
    assert fast.optimization_report.graphs == ["all: modules run: the attention implementation was changed"]


def test_copies_capture_for_themselves_and_models_are_freed() -> None:
    fast = llm.optimize(tiny_model("llama"))
    batch = padded_batch()
    expected = fast.generate(**batch, **GENERATE)
    other = copy.deepcopy(fast)
    assert not other.forward.graphs
    assert torch.equal(other.generate(**batch, **GENERATE), expected)
    assert len(other.forward.graphs) == len(fast.forward.graphs) == 2
    dead = weakref.ref(fast), weakref.ref(fast.model.layers[0])
    del fast
    gc.collect()
    assert [reference() for reference in dead] == [None, None]
    assert torch.equal(other.generate(**batch, **GENERATE), expected)


def test_a_method_of_a_model_that_nobody_keeps() -> None:
    generate = llm.optimize(tiny_model("llama")).generate
    gc.collect()
    with pytest.raises(ReferenceError, match="the model is gone: keep it in a variable"):
        generate(**padded_batch(), **GENERATE)


def test_export_and_compile_take_the_modules(pair: tuple[Any, Any]) -> None:
    fast, ids = copy.deepcopy(pair[0]), padded_batch()["input_ids"]
    expected = pair[1](ids, use_cache=False).logits
    exported = torch.export.export(fast, (), {"input_ids": ids, "use_cache": False})
    assert error(exported.module()(input_ids=ids, use_cache=False).logits, expected) < 1e-5
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    assert error(compiled(ids, past_key_values=llm.KVCache(fast.config)).logits, expected) < 1e-5
    torch._dynamo.reset()
    assert not fast.forward.graphs and not fast.forward.reasons


class Interrupt(LogitsProcessor):
    """Counts steps; stands for whatever user code runs between two of them."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores.roll(self.calls, -1)


def test_generate_with_processors_and_operators_counted(pair: tuple[Any, Any]) -> None:
    fast, slow = pair
    batch, tokens = padded_batch(), []
    for model in (slow, fast):
        with CountOperators() as count:
            tokens.append(model.generate(**batch, **GENERATE, logits_processor=LogitsProcessorList([Interrupt()])))
        assert count["attention"] == 8 * 2
    assert torch.equal(*tokens)
