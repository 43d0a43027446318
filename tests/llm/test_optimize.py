"""`optimize`: its arguments, what it leaves alone, the report, strict, and failures."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import transformers
from models import PAD, VOCAB, error, padded_batch, tiny_model
from torch import nn

from llmrt import llm
from llmrt.llm import convert
from llmrt.llm.dense import DenseLinear
from llmrt.llm.linear import QuantLinear

INT4 = {"group_size": 32}


def fresh(name: str = "llama") -> Any:
    return copy.deepcopy(tiny_model(name))


def fingerprint(model: Any) -> tuple[Any, ...]:
    """Everything that optimize may not change when it refuses or copies."""
    modules = [(name, type(m)) for name, m in model.named_modules()]
    tensors = [(name, id(p), p.dtype, p._version) for name, p in model.named_parameters()]
    return modules, tensors, model.config.to_json_string(), model.config._attn_implementation, sorted(model.__dict__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": object()}, "optimizer must be None"),
        ({"dtype": torch.float64}, "dtype is torch.float64; valid: torch.float32"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"device": "tpu"}, "device is 'tpu'; valid: 'cpu', 'xpu', 'cuda'"),
        ({"device": "xpu"}, "device is 'xpu', but this PyTorch"),
        ({"device": "cuda:1"}, "device is 'cuda:1', but this PyTorch"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is a dict; valid: llm.WeightOnlyQuantConfig"),
        ({"qconfig_summary_file": "q.json"}, "for static INT8; pass it with a StaticQuantConfig"),
        ({"low_precision_checkpoint": 3}, "low_precision_checkpoint is a int; valid: a state dict"),
        (
            {"quantization_config": llm.WeightOnlyQuantConfig(modules_to_not_convert=["typo"])},
            "'typo', which matches no",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_change_nothing(options: dict[str, Any], message: str) -> None:
    model = fresh()
    before = fingerprint(model)
    with pytest.raises((ValueError, RuntimeError), match=message):
        llm.optimize(model, inplace=True, **options)
    assert fingerprint(model) == before


def test_models_that_cannot_be_optimized() -> None:
    with pytest.raises(ValueError, match="model is a Linear; expected a transformers PreTrainedModel"):
        llm.optimize(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="training mode"):
        llm.optimize(fresh().train())
    with pytest.raises(ValueError, match="has no language-model head"):
        llm.optimize(fresh().model)
    with pytest.raises(ValueError, match=r"lm_head\.weight is on meta; expected a model on the CPU"):
        model = fresh()
        model.lm_head.to("meta")
        llm.optimize(model)
    with pytest.raises(ValueError, match=r"has dtype torch\.float64; pass dtype"):
        llm.optimize(fresh().double())
    with pytest.raises(ValueError, match="optimized already"):
        llm.optimize(llm.optimize(fresh()))
    broken = fresh()
    broken.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    before = fingerprint(broken)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has NaN or infinite values"):
        llm.optimize(broken, inplace=True, quantization_config=llm.WeightOnlyQuantConfig(**INT4))
    assert fingerprint(broken) == before


@pytest.mark.parametrize("quantized", [False, True])
def test_a_copy_leaves_the_model_and_shares_its_weights(quantized: bool) -> None:
    model, batch = fresh("gemma2"), padded_batch()
    before, expected = fingerprint(model), model(**batch).logits
    config = llm.WeightOnlyQuantConfig(**INT4) if quantized else None
    fast = llm.optimize(model, quantization_config=config)
    fast.generate(**batch, max_new_tokens=3)
    assert fingerprint(model) == before
    assert torch.equal(model(**batch).logits, expected)
    mine = {id(p) for p in model.parameters()}
    assert all(id(p) in mine for p in fast.parameters())
    assert fast.model.embed_tokens.weight is model.model.embed_tokens.weight


def test_in_place_frees_what_it_replaces() -> None:
    model = fresh()
    weights = [weakref.ref(m.weight) for m in model.modules() if isinstance(m, nn.Linear)]
    norm, result = (
        model.model.norm.weight,
        llm.optimize(model, inplace=True, quantization_config=llm.WeightOnlyQuantConfig(**INT4)),
    )
    assert result is model and model.model.norm.weight is norm
    assert all(w() is None for w in weights)
    alive = weakref.ref(model)
    del model, result
    assert alive() is None, "an optimized model is freed without the garbage collector"


def test_dtype_applies_to_what_stays() -> None:
    model = fresh("qwen2")
    fast = llm.optimize(model, dtype=torch.bfloat16, quantization_config=llm.WeightOnlyQuantConfig(**INT4))
    assert {p.dtype for p in fast.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert fast(**padded_batch()).logits.dtype == torch.bfloat16
    tied = fresh("gemma")
    half = llm.optimize(tied, dtype=torch.float16, inplace=True)
    assert half.lm_head.weight is half.model.embed_tokens.weight and half.dtype == torch.float16


def test_report_names_everything() -> None:
    config = llm.WeightOnlyQuantConfig(**INT4, modules_to_not_convert=["k_proj", "layers.0.mlp.up_proj"], lm_head=False)
    model = tiny_model("llama")
    fast = llm.optimize(model, quantization_config=config, strict=True)
    report = fast.optimization_report
    named = {e.name for e in report.entries}
    leaves = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    assert leaves <= named and {"", "model.norm", "model.layers.1.self_attn"} <= named
    reasons = {e.name: e.reason for e in report.entries}
    assert reasons["lm_head"] == "lm_head=False"
    assert reasons["model.layers.1.self_attn.k_proj"] == "modules_to_not_convert has 'k_proj'"
    assert reasons["model.layers.0.mlp"] == "modules_to_not_convert keeps some of its linears"
    assert not report.unoptimized and report.family == "llama"
    linear = type(fast.lm_head), type(fast.model.layers[0].mlp.up_proj), type(fast.model.layers[0].mlp.gate_proj)
    assert linear == (DenseLinear, DenseLinear, QuantLinear)
    text = str(report)
    assert "self_attn.k_proj [linear] x 2 -> ops.dense_linear: modules_to_not_convert has 'k_proj'" in text
    assert report.bytes_before == sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
    assert report.bytes_after < report.bytes_before


def test_strict_names_what_would_stay() -> None:
    model = fresh()
    model.model.layers[1].input_layernorm.register_forward_hook(lambda *args: None)
    before = fingerprint(model)
    with pytest.raises(
        llm.OptimizationError, match=r"layers\.\*\.input_layernorm \[norm\]: the module has forward hooks"
    ):
        llm.optimize(model, inplace=True, strict=True)
    assert fingerprint(model) == before
    (entry,) = llm.optimize(model).optimization_report.unoptimized
    assert entry.name == "model.layers.1.input_layernorm" and entry.by is None


class OddMlp(nn.Module):
    """Looks like a gated feed-forward module and is none."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            old.gate_proj,
            old.up_proj,
            old.down_proj,
            old.act_fn,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) + 1)


def test_a_part_that_computes_something_else_is_kept() -> None:
    model, batch = fresh(), padded_batch()
    for layer in model.model.layers:
        layer.mlp = OddMlp(layer.mlp).eval()
    fast = llm.optimize(model)
    assert error(fast(**batch).logits, model(**batch).logits, batch["attention_mask"]) < 1e-4
    assert [e.reason for e in fast.optimization_report.unoptimized] == [
        "OddMlp does not compute down(silu(gate) * up)"
    ] * 2


@pytest.mark.parametrize("name", ["GPT2", "Olmo2", "Cohere", "Bloom"])
def test_a_model_without_a_row(name: str) -> None:
    options = {"n_embd": 48, "n_head": 4, "n_layer": 2} if name in ("GPT2", "Bloom") else {}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=PAD, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config).eval()
    fast, batch = llm.optimize(model), padded_batch()
    assert error(fast(**batch).logits, model(**batch).logits, batch["attention_mask"]) < 1e-4
    for beams in (1, 3):
        options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
        assert torch.equal(fast.generate(**batch, **options), model.generate(**batch, **options))
    report = fast.optimization_report
    assert report.family is None and "no row for" in str(report)
    missing = {"Cohere": {"norm", "rope"}, "Bloom": {"attention", "cache"}}.get(name, set())
    assert {e.kind for e in report.unoptimized} == missing


@pytest.mark.parametrize(("step", "quantized"), [("_rope", False), ("_attention", False), ("_gated", True)])
def test_a_failure_leaves_the_model_as_it_was(step: str, quantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fresh(), padded_batch()
    before, expected = fingerprint(model), model(**batch).logits

    def fail(*args: Any) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(convert.Converter, step, fail)
    config = llm.WeightOnlyQuantConfig(**INT4) if quantized else None
    with pytest.raises(MemoryError):
        llm.optimize(model, inplace=True, quantization_config=config)
    assert fingerprint(model) == before
    assert torch.equal(model(**batch).logits, expected)


def test_a_half_converted_model_refuses_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    calls = []
    original = convert.Converter._linear

    def fail_later(self: Any, step: Any) -> None:
        calls.append(step)
        if len(calls) == 2:
            raise MemoryError("no memory")
        original(self, step)

    monkeypatch.setattr(convert.Converter, "_linear", fail_later)
    with pytest.raises(RuntimeError, match="this model object is unusable"):
        llm.optimize(model, inplace=True, quantization_config=llm.WeightOnlyQuantConfig(**INT4))
    with pytest.raises(RuntimeError, match="this model object is unusable"):
        model(**padded_batch())
    kept = fresh()  # a copy is simply not returned
    with pytest.raises(MemoryError):
        calls.clear()
        llm.optimize(kept, quantization_config=llm.WeightOnlyQuantConfig(**INT4))
    kept(**padded_batch())
    gc.collect()


@pytest.mark.parametrize("quantized", [False, True])
def test_inputs(quantized: bool) -> None:
    config = llm.WeightOnlyQuantConfig(weight_dtype="int8", compute_dtype="fp32", group_size=16) if quantized else None
    plain = tiny_model("llama")
    fast = llm.optimize(plain, quantization_config=config)
    with pytest.raises(ValueError, match="the input has no token"):
        fast(torch.empty((1, 0), dtype=torch.long))
    with pytest.raises(ValueError, match="the input has no token"):
        fast.generate(torch.empty((1, 0), dtype=torch.long), max_new_tokens=2)
    long = torch.randint(3, VOCAB, (1, 150))  # beyond max_position_embeddings 128: rotations have no end
    assert error(fast(long).logits, plain(long).logits) < (0.1 if quantized else 1e-4)
    right = {key: x.flip(1) for key, x in padded_batch().items()}
    alone = [fast(ids[mask.bool()][None]).logits[0] for ids, mask in zip(*right.values(), strict=True)]
    together = fast(**right).logits[right["attention_mask"].bool()]
    assert error(together, torch.cat(alone)) < 1e-4
    for name in ("opt", "gpt_bigcode"):
        bounded = llm.optimize(tiny_model(name))
        with pytest.raises(ValueError, match="the sequence is too long: the model's position table has 1"):
            bounded(long)
        with pytest.raises(ValueError, match="too long"):
            bounded.generate(long[:, :125], max_new_tokens=8)
