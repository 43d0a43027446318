"""`optimize(low_precision_checkpoint=...)`: matched by name, put into a copy or in place, refused without a trace."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_directories import fields, pack_linear
from models import error, padded_batch, tiny_model
from torch import nn

from llmrt import llm

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}


def packed(model: Any, act_order: bool = False, skip: str = "lm_head") -> dict[str, torch.Tensor]:
    """Return GPTQ tensors of all linears but `skip`; the model gets their values."""
    state = {}
    for index, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and skip not in name:
            parts, weight = pack_linear(module.in_features, module.out_features, act_order, index)
            state.update({f"{name}.{key}": value for key, value in parts.items()})
            module.weight = nn.Parameter(weight, False)
    return state


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("prefix", ["", "model."], ids=["without prefix", "with prefix"])
def test_gptq_tensors(act_order: bool, prefix: str) -> None:
    expected = copy.deepcopy(tiny_model("qwen2"))
    state, batch, model = packed(expected, act_order), padded_batch(), tiny_model("qwen2")
    state = {prefix + key.removeprefix("model."): value for key, value in state.items()}
    before = model(**batch).logits
    fast = llm.optimize(model, low_precision_checkpoint=(state, GPTQ))
    assert torch.equal(model(**batch).logits, before), "the given model is as it was"
    from llmrt.llm.quantized import quantized_linears

    found = {q.name: q.weight() for q in quantized_linears(fast)}
    assert len(found) == 14 and all(torch.equal(w, expected.get_submodule(n).weight) for n, w in found.items())
    assert "low-precision checkpoint" in str(fast.optimization_report)
    config = llm.WeightOnlyQuantConfig(compute_dtype="fp32", lm_head=False)
    exact = llm.optimize(model, low_precision_checkpoint=(state, GPTQ), quantization_config=config)
    assert error(exact(**batch).logits, expected(**batch).logits, batch["attention_mask"]) < 2e-5


def test_a_state_dict_alone_is_taken_for_gptq(tmp_path: Path) -> None:
    model, batch = copy.deepcopy(tiny_model("llama")), padded_batch()
    state = packed(model)
    with pytest.warns(UserWarning, match=r"no configuration: the layout of GPTQ .version 1. is assumed"):
        fast = llm.optimize(tiny_model("llama"), low_precision_checkpoint=state)
    assert "the layout of GPTQ (version 1) is assumed" in str(fast.optimization_report)
    same = llm.optimize(tiny_model("llama"), low_precision_checkpoint=(state, GPTQ))
    assert torch.equal(fast(**batch).logits, same(**batch).logits)
    fast.save_pretrained(tmp_path)
    assert torch.equal(llm.from_quantized(tmp_path)(**batch).logits, fast(**batch).logits)


def test_a_map_of_keys() -> None:
    model = copy.deepcopy(tiny_model("opt"))
    state, batch = {}, padded_batch()
    for index, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            draw = torch.Generator().manual_seed(index)
            n, k = module.weight.shape
            codes, zeros = (torch.randint(16, s, generator=draw) for s in ((n, k), (n, k // 16)))
            scales = (torch.rand(n, k // 16, generator=draw) + 0.5) * 0.2 / k**0.5
            parts = {"w": fields(codes, 1), "s": scales, "z": zeros.int()}
            state.update({f"{name}.{key}": value for key, value in parts.items()})
            each = [t.repeat_interleave(16, 1) for t in (zeros, scales)]
            module.weight = nn.Parameter((codes - each[0]) * each[1], False)
    keys = {"weight_key": "w", "scale_key": "s", "zero_point_key": "z"}
    config = llm.WeightOnlyQuantConfig(compute_dtype="fp32", lm_head=False)
    fast = llm.optimize(tiny_model("opt"), low_precision_checkpoint=(state, keys), quantization_config=config)
    assert error(fast(**batch).logits, model(**batch).logits, batch["attention_mask"]) < 2e-5, (
        "the model's own biases too"
    )
    for key, message in (
        ("w", r"no model.decoder.layers.1.fc1.w .weight_key"),
        ("s", "fc1.s .scale_key"),
        ("z", "fc1.z .zero_point_key"),
    ):
        name = f"model.decoder.layers.1.fc1.{key}"
        with pytest.raises(ValueError, match=message):
            llm.optimize(
                tiny_model("opt"), low_precision_checkpoint=({k: v for k, v in state.items() if k != name}, keys)
            )


def test_in_place_frees_the_float_weights_and_takes_linears_from_meta() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    state, batch = packed(copy.deepcopy(model)), padded_batch()
    expected = llm.optimize(model, low_precision_checkpoint=(state, GPTQ))(**batch).logits
    old = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    model.model.layers[1].mlp.down_proj.to("meta")
    fast = llm.optimize(model, inplace=True, low_precision_checkpoint=(state, GPTQ))
    gc.collect()
    assert fast is model and old() is None and torch.equal(fast(**batch).logits, expected)
    bare = copy.deepcopy(tiny_model("llama"))
    bare.lm_head.to("meta")
    with pytest.raises(ValueError, match="lm_head is on the meta device, and low_precision_checkpoint has no weight"):
        llm.optimize(bare, low_precision_checkpoint=(state, GPTQ))


def test_linears_that_the_state_dict_lacks_are_quantized_if_asked_for() -> None:
    state = packed(copy.deepcopy(tiny_model("llama")), skip="o_proj")
    state = {k: v for k, v in state.items() if "lm_head" not in k}
    config = llm.WeightOnlyQuantConfig(group_size=32, modules_to_not_convert=["down_proj"])
    fast = llm.optimize(tiny_model("llama"), low_precision_checkpoint=(state, GPTQ), quantization_config=config)
    layer = fast.model.layers[0]
    assert str(layer.self_attn.q_proj.group.layout).startswith("int") and "g16" in str(
        layer.self_attn.q_proj.group.layout
    )
    assert str(layer.self_attn.o_proj.layout) == "int4_sym_g32_bf16" and "int8" in str(fast.lm_head.layout)
    assert isinstance(layer.mlp.down_proj, nn.Linear)
    assert torch.equal(layer.mlp.down_proj.weight, tiny_model("llama").model.layers[0].mlp.down_proj.weight)


UP = "model.layers.1.mlp.up_proj."


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(UP + "qweight"), "no model.layers.1.mlp.up_proj.qweight .weight_key"),
        (lambda s: s.pop(UP + "scales"), "no model.layers.1.mlp.up_proj.scales .scale_key"),
        (lambda s: s.update({UP + "qweight": s[UP + "qweight"][:2]}), "up_proj.qweight has shape"),
        (lambda s: s[UP + "scales"].fill_(torch.inf), "up_proj.*scales"),
        (lambda s: s.update(x=3), "'x' is a int; expected names and tensors"),
        (
            lambda s: s.update({"blocks.1.up.qweight": s[UP + "qweight"]}),
            "blocks.1.up are quantized .* no linear of Llama",
        ),
        (lambda s: s.clear(), "has no quantized weight of a linear of the model: it has tensors of nothing"),
    ],
)
def test_refused_without_a_trace(change: Any, message: str, inplace: bool) -> None:
    model, batch = copy.deepcopy(tiny_model("llama")), padded_batch()
    state = packed(copy.deepcopy(model))
    change(state)
    before = model(**batch).logits
    with pytest.raises(ValueError, match=message):
        llm.optimize(model, inplace=inplace, low_precision_checkpoint=(state, GPTQ))
    assert torch.equal(model(**batch).logits, before) and isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


@pytest.mark.parametrize("given", [3, ({}, 3), ([], {}), ({}, {}, {})])
def test_arguments_of_another_kind(given: Any) -> None:
    with pytest.raises(ValueError, match=r"low_precision_checkpoint is a \w+; valid: a state dict, or"):
        llm.optimize(tiny_model("llama"), low_precision_checkpoint=given)
