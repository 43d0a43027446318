"""The seams one by one: mask patterns, rotations, norms, feed-forward modules, and that transformers itself stays as it is."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from models import MODELS, CountOperators, error, padded_batch, tiny_model
from torch import nn
from transformers import masking_utils
from transformers.activations import ACT2FN

from llmrt import llm
from llmrt.llm import attention, probe
from llmrt.llm.rope import called_rotation, with_rotation


def test_importing_changes_nothing_in_transformers() -> None:
    code = """
import json, transformers, transformers.cache_utils, transformers.masking_utils, transformers.modeling_utils as m
from transformers.models.llama import modeling_llama as family
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers
def state():
    parts = [dict(vars(family.LlamaAttention)), dict(vars(m.PreTrainedModel)), dict(vars(family)), dict(vars(transformers.cache_utils)),
             dict(vars(transformers.masking_utils)), dict(vars(transformers.GenerationMixin))]
    return [{k: id(v) for k, v in part.items()} for part in parts]
tables = [m.ALL_ATTENTION_FUNCTIONS._global_mapping, transformers.masking_utils.AttentionMaskInterface._global_mapping, quantizers]
before, names = state(), [dict(t) for t in tables]
from llmrt import llm
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                                               num_attention_heads=2)).eval()
llm.optimize(model, inplace=True, quantization_config=llm.WeightOnlyQuantConfig(group_size=32))
after = state()
for old, new in zip(before, after):
    old.pop("_can_set_attn_implementation_cached_value", None), new.pop("_can_set_attn_implementation_cached_value", None)
assert [set(o.items()) ^ set(n.items()) for o, n in zip(before, after)] == [set()] * len(before)
assert [set(t) - set(n) for t, n in zip(tables, names)] == [{"llmrt"}] * 2 + [{"llmrt", "llmrt-import", "llmrt-static"}]
assert all(t[k] is v for t, n in zip(tables, names) for k, v in n.items())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_mask_patterns() -> None:
    causal, window = masking_utils.causal_mask_function, masking_utils.sliding_window_causal_mask_function(3)
    assert attention.is_causal_pattern(causal) and attention.is_causal_pattern(window)
    for other in (
        masking_utils.bidirectional_mask_function,
        masking_utils.and_masks(causal, masking_utils.bidirectional_mask_function),
        masking_utils.or_masks(causal, window),
        masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int)),
        lambda *index: index[2] >= index[3],
    ):
        assert not attention.is_causal_pattern(other)
    sizes = {"batch_size": 2, "q_length": 3, "kv_length": 5, "q_offset": 2}
    assert attention.attention_mask(**sizes) is None
    padding = torch.tensor([[False, True, True, True, True], [True] * 5])
    assert torch.equal(attention.attention_mask(**sizes, attention_mask=padding), padding)
    assert attention.attention_mask(**sizes, attention_mask=torch.ones(2, 5, dtype=torch.bool)) is None
    whole = attention.attention_mask(**{**sizes, "kv_length": 8}, attention_mask=padding)  # a static cache's buffer
    assert whole.shape == (2, 1, 3, 8) and whole[0, 0, 2].tolist() == [False] + [True] * 4 + [False] * 3


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2", "gpt_bigcode"])
def test_masks_of_all_kinds(name: str) -> None:
    plain, batch = tiny_model(name), padded_batch()
    fast, ids = llm.optimize(plain), batch["input_ids"]
    torch.manual_seed(0)
    chosen = (torch.rand(3, 1, 11, 11) < 0.5) | torch.eye(11, dtype=torch.bool)
    added = torch.where(chosen, 0.0, torch.finfo(torch.float32).min)
    for mask in (chosen, added):
        assert error(fast(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits) < 1e-4
    if name != "gpt_bigcode":  # several sequences in one row, told apart by their positions
        packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2]]), "use_cache": False}
        expected = plain(ids[:1], **packed).logits
        assert error(fast(ids[:1], **packed).logits, expected) < 1e-4
        assert error(plain(ids[:1], use_cache=False).logits, expected) > 1e-3
    holes = batch["attention_mask"].clone()
    holes[:, 7] = 0
    expected = plain(ids, attention_mask=holes).logits
    assert error(fast(ids, attention_mask=holes).logits, expected, holes) < 1e-4


@pytest.mark.parametrize("name", ["gemma3", "gemma2"])
def test_bidirectional_attention(name: str) -> None:
    plain = copy.deepcopy(tiny_model(name))
    plain.config.use_bidirectional_attention = True
    if name == "gemma2":
        plain.config.is_causal = False
    for layer in plain.model.layers:
        layer.self_attn.is_causal = False
    fast, batch = llm.optimize(plain), padded_batch()
    options = {"use_cache": False}
    expected = plain(**batch, **options).logits
    assert error(fast(**batch, **options).logits, expected, batch["attention_mask"]) < 1e-4
    assert error(tiny_model(name)(**batch, **options).logits, expected, batch["attention_mask"]) > 1e-3


def test_what_attention_refuses() -> None:
    fast = llm.optimize(tiny_model("llama"))
    module = fast.model.layers[0].self_attn
    q, k = torch.randn(1, 4, 2, 12), torch.randn(1, 2, 2, 12)
    for options, message in (
        ({"dropout": 0.1}, "dropout is 0.1"),
        ({"position_bias": q}, "takes no position_bias"),
        ({"cache": object()}, "no paged cache"),
    ):
        with pytest.raises(ValueError, match=message):
            attention.attention_forward(module, q, k, k, None, **options)
    out, weights = attention.attention_forward(module, q, k, k, None)
    assert weights is None and out.shape == (1, 2, 4, 12)


def test_sinks_and_softcap_reach_the_operator() -> None:
    torch.manual_seed(0)
    module = nn.Module()
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    sinks = torch.randn(4)
    got, _ = attention.attention_forward(module, q, k, v, None, softcap=2.0, s_aux=sinks)
    scores = 2 * torch.tanh(q @ k.repeat_interleave(2, 1).mT * 8**-0.5 / 2)
    scores = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
    weights = torch.cat((scores, sinks.view(1, 4, 1, 1).expand(1, 4, 3, 1)), -1).softmax(-1)[..., :3]
    assert error(got.transpose(1, 2), weights @ v.repeat_interleave(2, 1)) < 1e-5


def attention_class(name: str) -> Any:
    plain = tiny_model(name)
    return next(type(m) for m in plain.modules() if "Attention" in type(m).__name__)


@pytest.mark.parametrize("name", [name for name, tiny in MODELS.items() if tiny.rope])
def test_rotations(name: str) -> None:
    cls = attention_class(name)
    original = called_rotation(cls, "apply_rotary_pos_emb")
    assert callable(original)
    styles = [style for style in ("half", "interleaved") if probe.probe_rotation(original, style)]
    assert styles == ["interleaved" if name.startswith("glm") else "half"]
    patched = with_rotation(cls, "apply_rotary_pos_emb", styles[0])
    assert issubclass(patched, cls) and patched is with_rotation(cls, "apply_rotary_pos_emb", styles[0])
    assert (
        patched.forward.__code__ is cls.forward.__code__ and cls.forward.__globals__["apply_rotary_pos_emb"] is original
    )


def test_rotations_that_are_none() -> None:
    assert called_rotation(attention_class("opt"), "apply_rotary_pos_emb") is None
    assert not probe.probe_rotation(lambda q, k, cos, sin: (q, k), "half")
    half = called_rotation(attention_class("llama"), "apply_rotary_pos_emb")
    assert callable(half) and not probe.probe_rotation(half, "interleaved")

    class Decorated(nn.Module):
        forward = torch.no_grad()(attention_class("llama").forward)

    assert called_rotation(Decorated, "apply_rotary_pos_emb") == "forward of Decorated is wrapped by a decorator"


def test_activations_are_told_apart() -> None:
    names = {
        "silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu",
        "quick_gelu": None, "relu2": None, "tanh": None, "leaky_relu": None, "mish": None,
    }  # fmt: skip
    assert {key: probe.probe_activation(ACT2FN[key]) for key in names} == names


def test_norms_are_told_apart() -> None:
    plain, shifted = tiny_model("llama").model.norm, tiny_model("gemma").model.norm
    assert probe.probe_rms_norm(plain, 0.0) and not probe.probe_rms_norm(plain, 1.0)
    assert probe.probe_rms_norm(shifted, 1.0) and not probe.probe_rms_norm(shifted, 0.0)


def test_operators_run_below_the_modules() -> None:
    fast = llm.optimize(tiny_model("gemma"))
    x = torch.randn(2, 3, 48)
    mlp = {"gelu_mul": 1, "dense_linear": 3}
    for module, operators in ((fast.model.norm, {"rms_norm": 1}), (fast.model.layers[0].mlp, mlp)):
        with CountOperators() as count:
            module(x)
        assert dict(count.calls) == operators
