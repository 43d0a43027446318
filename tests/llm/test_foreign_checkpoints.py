"""Loading quantized directories of other formats: the frame around the readers, shown with the smallest reader there is."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_directories import TINY_READERS, edit_json, pack_linear, save_gptq
from models import MODELS, CountOperators, error, padded_batch, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from llmrt import llm
from llmrt.llm.checkpoints import readers
from llmrt.llm.linear import SiblingLinear
from llmrt.llm.mlp import QuantGatedMLP
from llmrt.passes.backend import llmrt_backend


@pytest.fixture(autouse=True)
def tiny_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "READERS", TINY_READERS)


def saved(directory: Path, name: str = "llama", **options: Any) -> Any:
    """Write a GPTQ directory; return the plain model with the dequantized weights."""
    return save_gptq(copy.deepcopy(tiny_model(name)), directory, **options)


def edit_tensors(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def same_weights(fast: Any, plain: Any) -> None:
    """Every quantized linear stands for exactly the weight that the packer gave the plain model."""
    count = 0
    for found in llm_quantized(fast):
        assert torch.equal(found.weight(), plain.get_submodule(found.name).weight), found.name
        count += 1
    linears = sum(isinstance(m, nn.Linear) for m in plain.modules())
    assert count == linears - 1, "all but the head"


def llm_quantized(model: Any) -> Any:
    from llmrt.llm.quantized import quantized_linears

    return quantized_linears(model)


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma", "gpt_neox", "opt"])
def test_exact_weights_and_logits(name: str, act_order: bool, tmp_path: Path) -> None:
    plain, batch = saved(tmp_path, name, act_order=act_order), padded_batch()
    fast = llm.AutoModelForCausalLM.from_pretrained(tmp_path, compute_dtype="fp32")
    assert type(fast) is type(plain) and not fast.training
    same_weights(fast, plain)
    with CountOperators() as count:
        logits = fast(**batch).logits
    assert error(logits, plain(**batch).logits, batch["attention_mask"]) < 2e-5
    assert count["quant_linear"] == 2 * MODELS[name].linears, "siblings, gate and up are one product also when permuted"
    assert fast.lm_head.weight.dtype == torch.float32 and fast.config.quantization_config.lm_head is False
    tokens = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(fast.generate(**batch, **tokens), plain.generate(**batch, **tokens))


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
def test_saved_in_shards_and_loaded_in_a_fresh_process(act_order: bool, tmp_path: Path) -> None:
    saved(tmp_path / "gptq", "qwen2", act_order=act_order)
    fast, batch = llm.AutoModelForCausalLM.from_pretrained(tmp_path / "gptq"), padded_batch()
    fast.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    torch.save(batch, tmp_path / "batch.pt")
    code = (
        "import sys, torch\nfrom llmrt import llm\nd = sys.argv[1]\ntorch.set_num_threads(1)\n"
        "model = llm.AutoModelForCausalLM.from_pretrained(d)\n"
        "torch.save(model(**torch.load(d + '/batch.pt')).logits, d + '/logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), fast(**batch).logits)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, fast(**batch).logits)
    config = again.config.quantization_config
    assert (config.source, config.group_size, config.scheme) == ("tiny-gptq", 16, "asym")
    assert bool(config.permuted_modules) == act_order


def test_siblings_stay_apart_where_orders_or_layouts_differ(tmp_path: Path) -> None:
    plain, batch = saved(tmp_path, act_order=True), padded_batch()

    def other(tensors: dict[str, torch.Tensor]) -> None:
        for number, name in enumerate(("self_attn.v_proj", "mlp.up_proj")):
            linear = plain.model.layers[1].get_submodule(name)
            parts, weight = pack_linear(linear.in_features, linear.out_features, True, 90 + number)
            tensors.update({f"model.layers.1.{name}.{key}": value for key, value in parts.items()})
            linear.weight = nn.Parameter(weight, False)

    edit_tensors(tmp_path, other)
    fast = llm.AutoModelForCausalLM.from_pretrained(tmp_path, compute_dtype="fp32")
    attention = fast.model.layers[1].self_attn
    assert isinstance(attention.q_proj, SiblingLinear) and attention.q_proj.group is attention.k_proj.group
    assert isinstance(attention.v_proj, llm.QuantLinear) and attention.v_proj.perm is not None
    assert isinstance(fast.model.layers[0].mlp, QuantGatedMLP)
    assert isinstance(fast.model.layers[1].mlp.up_proj, llm.QuantLinear)
    assert "gate and up are stored in different formats" in str(fast.optimization_report)
    same_weights(fast, plain)
    assert error(fast(**batch).logits, plain(**batch).logits, batch["attention_mask"]) < 2e-5
    fast.save_pretrained(tmp_path / "q")
    again = llm.from_quantized(tmp_path / "q")
    assert torch.equal(again(**batch).logits, fast(**batch).logits)


def test_a_bias_that_the_class_does_not_have(tmp_path: Path) -> None:
    plain, batch = saved(tmp_path), padded_batch()
    bias = torch.linspace(-1, 1, 48).half()
    prefix = "model.layers.1.self_attn."
    edit_tensors(
        tmp_path, lambda t: t.update({prefix + "q_proj.bias": bias, prefix + "o_proj.bias": torch.zeros_like(bias)})
    )
    plain.model.layers[1].self_attn.q_proj.bias = nn.Parameter(bias.float())
    fast = llm.AutoModelForCausalLM.from_pretrained(tmp_path, compute_dtype="fp32")
    assert error(fast(**batch).logits, plain(**batch).logits, batch["attention_mask"]) < 2e-5
    assert fast.config.quantization_config.biased_modules == [prefix + "q_proj"], "a bias of zeros is dropped"
    fast.save_pretrained(tmp_path / "q")
    assert torch.equal(llm.from_quantized(tmp_path / "q")(**batch).logits, fast(**batch).logits)
    with pytest.warns(UserWarning, match="q_proj has a bias that Linear of this model has no place for"):
        fast.dequantize()


def test_a_quantized_head_is_untied(tmp_path: Path) -> None:
    plain, batch = saved(tmp_path, "gemma", skip=("nothing",)), padded_batch()
    assert plain.config.tie_word_embeddings
    fast = llm.AutoModelForCausalLM.from_pretrained(tmp_path, compute_dtype="fp32")
    assert isinstance(fast.lm_head, llm.QuantLinear) and not fast.config.tie_word_embeddings
    fast.save_pretrained(tmp_path / "q")
    again = llm.from_quantized(tmp_path / "q")
    assert torch.equal(again(**batch).logits, fast(**batch).logits)
    assert torch.equal(again.get_input_embeddings().weight, tiny_model("gemma").get_input_embeddings().weight)


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"torch_dtype": "float16", "kv_dtype": "int8"}])
def test_dtypes_and_settings(options: dict[str, Any], tmp_path: Path) -> None:
    plain, batch = saved(tmp_path), padded_batch()
    fast = llm.AutoModelForCausalLM.from_pretrained(tmp_path, deployment_mode=False, **options)
    assert fast.dtype in (torch.bfloat16, torch.float16) and fast.lm_head.weight.dtype == fast.dtype
    assert error(fast(**batch).logits, plain(**batch).logits, batch["attention_mask"]) < 0.15
    same_weights(fast, plain)


def test_captured_compiled_and_exported_with_a_permutation(tmp_path: Path) -> None:
    saved(tmp_path, act_order=True)
    eager = llm.AutoModelForCausalLM.from_pretrained(tmp_path, deployment_mode=False)
    batch = padded_batch(2, 9)
    tokens = {"max_new_tokens": 6, "do_sample": False}
    expected, logits = eager.generate(**batch, **tokens), eager(**batch).logits
    captured = llm.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(captured.generate(**batch, **tokens), expected)
    assert captured.optimization_report.graphs and not captured.forward.reasons
    step = llm.export(eager).module()
    keys, values = llm.CachedModel(eager).caches(2, 16)
    assert error(step(*batch.values(), keys, values)[:, 0], logits[:, -1]) < 1e-5
    compiled = torch.compile(eager, backend=llmrt_backend, fullgraph=True)
    assert error(compiled(**batch, use_cache=False).logits, logits, batch["attention_mask"]) < 1e-5


def test_what_was_quantized_stays_so(tmp_path: Path) -> None:
    saved(tmp_path)
    load = llm.AutoModelForCausalLM.from_pretrained
    for options in ({"load_in_4bit": True}, {"quantization_config": llm.WeightOnlyQuantConfig()}):
        with pytest.raises(ValueError, match=r"is quantized already .quant_method 'tiny-gptq'"):
            load(tmp_path, **options)
    edit_json(tmp_path / "config.json", lambda c: c["quantization_config"].update(bits=5))
    with pytest.raises(ValueError, match="bits is 5; valid: 4"):
        load(tmp_path)
    edit_json(tmp_path / "config.json", lambda c: c["quantization_config"].update(quant_method="other"))
    with pytest.raises(ValueError, match=r"a format that cannot be read: .*'quant_method': 'other'"):
        load(tmp_path)
