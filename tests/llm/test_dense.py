"""Linears that stay floating point: the operator runs them, the model's weights and everything that torch does with them stay."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, CountOperators, error, padded_batch, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from llmrt import llm
from llmrt.llm.dense import DenseLinear

MODULES = {"deployment_mode": False}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("name", MODELS)
def test_modules_and_graphs_use_the_operators(name: str) -> None:
    plain, batch = tiny_model(name), padded_batch()
    for options in (MODULES, {}):
        fast = llm.optimize(plain, strict=True, **options)
        count = len(linears(fast))
        assert count and all(type(m) is DenseLinear for m in linears(fast).values())
        with torch.no_grad(), CountOperators() as calls:
            logits = fast(**batch, past_key_values=llm.KVCache(fast.config)).logits
        used = calls["dense_linear"] + calls["parallel_linear"] + calls["gated_linear"]
        assert used == count if options else 0 < used <= count
        assert error(logits, plain(**batch).logits, batch["attention_mask"]) < 1e-4
        lines = {e.name: e.by for e in fast.optimization_report.replaced}
        assert all(lines[linear] == "ops.dense_linear" for linear in linears(fast))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    plain, batch = copy.deepcopy(tiny_model("qwen2")), padded_batch()
    fast = llm.optimize(plain, dtype=dtype, **MODULES)
    expected = plain.to(dtype)(**batch).logits.float()
    with torch.no_grad():
        assert error(fast(**batch).logits.float(), expected, batch["attention_mask"]) < 0.03


def test_weights_and_state_stay(tmp_path: Path) -> None:
    plain, batch = tiny_model("gemma"), padded_batch()  # a tied head
    fast = llm.optimize(plain)
    old, new = plain.state_dict(), fast.state_dict()
    assert list(old) == list(new) and all(new[key].data_ptr() == old[key].data_ptr() for key in old)
    assert type(plain.lm_head) is nn.Linear and fast.lm_head.weight is fast.model.embed_tokens.weight
    fast.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, plain(**batch).logits)
    with torch.no_grad():
        expected = fast(**batch).logits
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert type(other.lm_head) is DenseLinear and torch.equal(other(**batch).logits, expected)


def test_gradients_autocast_and_other_dtypes_are_torchs() -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(24, 7), torch.randn(3, 24)
    fast = copy.deepcopy(plain)
    fast.__class__ = DenseLinear
    with torch.enable_grad():
        for linear in (plain, fast):
            linear(x).square().sum().backward()
    assert torch.equal(fast.weight.grad, plain.weight.grad)  # type: ignore[arg-type]
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fast(x).dtype == torch.bfloat16
        assert torch.equal(copy.deepcopy(fast).double()(x.double()), copy.deepcopy(plain).double()(x.double()))
        with CountOperators() as calls:
            fast(x)
        assert dict(calls.calls) == {"dense_linear": 1}
        compiled = torch.compile(fast, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), plain(x))


def test_an_adapter_around_a_linear() -> None:
    class Adapter(nn.Module):
        """What LoRA does: a small product beside the layer that it wraps."""

        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.up(self.down(x))

    fast, batch = llm.optimize(tiny_model("llama")), padded_batch()
    before = fast.generate(**batch, max_new_tokens=4, do_sample=False, num_beams=2)
    slow = copy.deepcopy(tiny_model("llama"))
    torch.manual_seed(0)
    adapters = Adapter(fast.model.layers[0].self_attn.q_proj), Adapter(slow.model.layers[0].self_attn.q_proj)
    adapters[1].load_state_dict(adapters[0].state_dict())
    for model, adapter in zip((fast, slow), adapters, strict=True):
        model.model.layers[0].self_attn.q_proj = adapter.eval()
    with torch.no_grad():
        assert error(fast(**batch).logits, slow(**batch).logits, batch["attention_mask"]) < 1e-4
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    got = fast.generate(**batch, **options)
    assert torch.equal(got, slow.generate(**batch, **options)) and got.shape == before.shape


def test_what_is_not_quantized() -> None:
    config = llm.WeightOnlyQuantConfig(group_size=32, modules_to_not_convert=["k_proj"], lm_head=False)
    fast = llm.optimize(tiny_model("llama"), quantization_config=config)
    kept = linears(fast)
    assert set(kept) == {"lm_head", *(f"model.layers.{i}.self_attn.k_proj" for i in (0, 1))}
    assert all(type(m) is DenseLinear for m in kept.values())
    reasons = {e.name: (e.by, e.reason) for e in fast.optimization_report.entries if e.name in kept}
    assert reasons["lm_head"] == ("ops.dense_linear", "lm_head=False")


def test_a_class_of_its_own_stays() -> None:
    class Own(nn.Linear):
        pass

    model = copy.deepcopy(tiny_model("llama"))
    model.lm_head.__class__ = Own
    fast = llm.optimize(model, strict=True)
    assert type(fast.lm_head) is Own
    assert "Own is a class of its own" in str({e.name: e.reason for e in fast.optimization_report.kept}["lm_head"])
