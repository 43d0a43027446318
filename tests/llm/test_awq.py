"""AWQ: scales are folded exactly, found by structure, and make the outputs better."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import TOKENS, config, correlated
from models import MODELS, dequantized, error, padded_batch, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from llmrt import llm
from llmrt.llm.algorithms import awq
from llmrt.llm.algorithms.awq import Awq, clipped
from llmrt.llm.algorithms.calibrate import _schemes
from llmrt.llm.algorithms.folding import Finder, fold
from llmrt.llm.algorithms.walk import Walk
from llmrt.llm.linear import Scheme, quantized
from llmrt.llm.plan import Planner
from llmrt.ops.formats import Layout, dequantize

# What the scales of each group of a layer go into, in the order of the calls; None: nothing is exact.
TARGETS = {
    "llama": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
    "qwen2": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
    "gemma2": ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"],
    "phi3": ["input_layernorm", "self_attn.qkv_proj", "post_attention_layernorm", "mlp.gate_up_proj"],
    "glm": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.gate_up_proj"],
    "gpt_neox": ["input_layernorm", "attention.query_key_value", "post_attention_layernorm", None],
    "gpt_bigcode": ["ln_1", "attn.c_attn", "ln_2", None],
    "opt": ["self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"],
    "starcoder2": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", None],
}


def walked(model: Any) -> tuple[Any, Any]:
    """Return the plan of a quantized model and a walk through it."""
    settings = config("awq")
    plan = Planner(model, settings).plan()
    return plan, Walk(model, _schemes(model, plan, settings), [t[None] for t in TOKENS])


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_found_and_folding_is_exact(name: str) -> None:
    plan, walk = walked(tiny_model(name))
    layer, finder = walk.layer(0), Finder(plan)
    layer.module.double()
    expected = layer.run(0, dtype=torch.float64)
    found = [finder.find(layer, group) for group in layer.groups]
    assert [t and t.name for t in found] == TARGETS[name]
    for group, target in zip(layer.groups, found, strict=True):
        if target is None:
            continue
        scale = target.shared(0.5 + 2 * torch.rand(layer.linear(group.names[0]).in_features, dtype=torch.float64))
        scale = fold(layer.module.get_submodule(target.name), target, scale, lambda part, old, new: new)
        for linear in group.names:
            layer.linear(linear).weight.data *= scale
        assert float((scale - 1).abs().max()) > 0.3
    assert error(layer.run(0, dtype=torch.float64), expected) < 1e-6  # norms of transformers compute in float32


def test_a_norm_that_something_else_reads_is_left_alone() -> None:
    plan, walk = walked(copy.deepcopy(tiny_model("llama")))
    layer = walk.layer(0)
    attention = layer.module.self_attn
    original = type(attention)

    class Leaky(original):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: torch.Tensor, **options: Any) -> Any:
            out, weights = super().forward(hidden_states=hidden_states, **options)
            return out + 0.1 * hidden_states, weights

    names = [t and t.name for t in (Finder(plan).find(layer, group) for group in layer.groups)]
    assert names == TARGETS["llama"]
    attention.__class__ = Leaky
    names = [t and t.name for t in (Finder(plan).find(layer, group) for group in layer.groups)]
    assert names == [None, *TARGETS["llama"][1:]]


def test_scales_of_grouped_queries_are_shared() -> None:
    plan, walk = walked(tiny_model("llama"))  # 4 query heads of 12, 2 key/value heads
    layer = walk.layer(0)
    target = Finder(plan).find(layer, layer.groups[1])
    assert target is not None
    heads = target.channels.view(2, 2, 12)
    assert torch.equal(heads[:, 0], torch.arange(24).view(2, 12)) and torch.equal(heads[:, 0], heads[:, 1])
    scale = target.shared(torch.cat((torch.full((12,), 2.0), torch.full((36,), 8.0))))
    assert torch.allclose(scale, torch.cat((torch.full((24,), 4.0), torch.full((24,), 8.0))))


@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_the_folded_scale_is_that_of_the_norm_as_stored(offset: float | None) -> None:
    from llmrt.llm.algorithms.folding import Target

    norm = nn.LayerNorm(64) if offset is None else nn.RMSNorm(64)
    for parameter in norm.parameters():
        parameter.requires_grad_(False).copy_(torch.randn(64))
    norm.weight[5] = 2**-8 - (offset or 0.0)  # the smallest step next to -1 in bfloat16: half of it is nothing
    before = copy.deepcopy(norm)
    target = Target("norm", torch.arange(64), torch.arange(64), offset)
    wanted = 0.5 + torch.rand(64)
    wanted[5] = 3.0
    scale = fold(norm, target, wanted, lambda part, old, new: new.bfloat16().float())
    assert torch.equal(norm.weight, norm.weight.bfloat16().float())
    shift = offset or 0.0
    assert torch.allclose((norm.weight + shift) * scale, before.weight + shift, rtol=1e-6)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [32, -1])
def test_clipping_never_makes_the_outputs_worse(asymmetric: bool, group: int) -> None:
    scheme = Scheme(Layout("int4", asymmetric, group, torch.bfloat16), "fp32")
    weight, x = torch.randn(24, 80) ** 3, correlated(300, 80).float()
    cut = clipped(weight, scheme, x.T @ x)
    assert bool((cut.abs() <= weight.abs()).all()) and not torch.equal(cut, weight)

    def errors(source: torch.Tensor) -> torch.Tensor:
        off = dequantize(*quantized(source, scheme), scheme.layout, 80) - weight
        size = scheme.layout.geometry(80).group
        return torch.stack([(x[:, i : i + size] @ off[:, i : i + size].T).square().sum(0) for i in range(0, 80, size)])

    assert bool((errors(cut) <= errors(weight) * 1.0001).all())
    assert errors(cut).sum() < 0.96 * errors(weight).sum()


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_calibrated_and_the_given_model_stays(name: str) -> None:
    plain, batch = tiny_model(name), padded_batch()
    before = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    options = {"weight_dtype": "int8", "scheme": "asym"} if name == "opt" else {}
    fast = llm.optimize(plain, quantization_config=config("awq", **options), strict=True)
    assert all(torch.equal(before[key], tensor) for key, tensor in plain.state_dict().items())
    near = llm.optimize(plain, quantization_config=config("rtn", **options))
    ids, exact = torch.stack(TOKENS), plain(torch.stack(TOKENS)).logits
    errors = [(m(ids).logits - exact).square().mean() for m in (fast, near)]
    assert errors[0] < errors[1]
    state = fast.state_dict()
    twin = dequantized(name, fast)
    own = {k: v for k, v in state.items() if k in before}
    twin.load_state_dict(own, strict=False)  # norms and biases that scales were folded into
    assert error(fast(**batch).logits, twin(**batch).logits, batch["attention_mask"]) < 1e-4


def test_salient_channels_get_larger_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.Tensor] = []
    choose = Awq._scale
    monkeypatch.setattr(Awq, "_scale", staticmethod(lambda *args: found.append(choose(*args)) or found[-1]))
    model = copy.deepcopy(tiny_model("llama"))
    model.model.layers[0].input_layernorm.weight[7] = 40.0
    fast = llm.optimize(model, quantization_config=config("awq", group_size=-1))
    assert int(found[0].argmax()) == 7 and found[0][7] > 2 * found[0].median()
    assert float(fast.model.layers[0].input_layernorm.weight[7]) < 20.0


def test_save_and_reload_is_bit_equal(tmp_path: Path) -> None:
    fast = llm.optimize(tiny_model("qwen2"), dtype=torch.bfloat16, quantization_config=config("awq", scheme="asym"))
    llm.save_quantized(fast, tmp_path)
    loaded, batch = AutoModelForCausalLM.from_pretrained(tmp_path), padded_batch()
    assert torch.equal(loaded(**batch).logits, fast(**batch).logits)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_interruption_leaves_the_model_as_it_was(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, batch = copy.deepcopy(tiny_model("llama")), padded_batch()
    expected, calls = plain(**batch).logits, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return clipped(*args)

    monkeypatch.setattr(awq, "clipped", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.optimize(plain, quantization_config=config("awq"), inplace=inplace)
    assert len(calls) == 9 and torch.equal(plain(**batch).logits, expected)
