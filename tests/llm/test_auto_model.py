"""`llm.AutoModelForCausalLM` on floating-point directories, and the predecessors' arguments."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import error, padded_batch, tiny_model

from llmrt import llm

load = llm.AutoModelForCausalLM.from_pretrained
G32 = {"group_size": 32}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    tiny_model("llama").save_pretrained(path)
    return path


def test_floating_point(plain: Path) -> None:
    batch, model = padded_batch(), load(plain)
    assert model.optimization_report is not None and model.dtype == torch.float32
    assert error(model(**batch).logits, tiny_model("llama")(**batch).logits, batch["attention_mask"]) < 1e-5
    assert load(plain, dtype="bfloat16").lm_head.weight.dtype == torch.bfloat16
    assert load(plain, load_in_low_bit="fp16").dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"quantization_config": llm.WeightOnlyQuantConfig(**G32)}, G32),
        ({"quantization_config": {"group_size": 32, "scheme": "asym"}}, {"group_size": 32, "scheme": "asym"}),
        ({"load_in_4bit": True}, {}),
        ({"load_in_8bit": True, "quantization_config": G32}, {"weight_dtype": "int8", **G32}),
        ({"load_in_low_bit": "sym_int4", "optimize_model": True, "use_neural_speed": False}, {}),
        ({"load_in_low_bit": "asym_int4"}, {"scheme": "asym"}),
        ({"load_in_low_bit": "int8"}, {"weight_dtype": "int8"}),
        ({"load_in_low_bit": "q4_0"}, {"use_ggml": True}),
        ({"load_in_4bit": True, "modules_to_not_convert": ["q_proj"]}, {"modules_to_not_convert": ["q_proj"]}),
        ({"load_in_4bit": True, "compute_dtype": "fp32"}, {"compute_dtype": "fp32"}),
    ],
)
def test_quantized_while_loading(options: dict[str, Any], expected: dict[str, Any], plain: Path) -> None:
    batch, model = padded_batch(), load(plain, **options)
    reference = llm.optimize(tiny_model("llama"), quantization_config=llm.WeightOnlyQuantConfig(**expected))
    assert torch.equal(model(**batch).logits, reference(**batch).logits)
    assert model.config.quantization_config == reference.config.quantization_config


def test_quantized_from_the_stored_values(plain: Path) -> None:
    """Weights are rounded once, from the file's float32, whatever the dtype of the rest."""
    model = load(plain, load_in_8bit=True, torch_dtype=torch.bfloat16)
    reference = llm.optimize(
        tiny_model("llama"), dtype=torch.bfloat16, quantization_config=llm.WeightOnlyQuantConfig(weight_dtype="int8")
    )
    batch = padded_batch()
    assert model.dtype == torch.bfloat16 and torch.equal(model(**batch).logits, reference(**batch).logits)


def test_own_directories_with_other_settings(tmp_path: Path) -> None:
    fast = llm.optimize(tiny_model("llama"), quantization_config=llm.WeightOnlyQuantConfig(**G32))
    fast.save_pretrained(tmp_path)
    batch = padded_batch()
    assert torch.equal(load(tmp_path)(**batch).logits, fast(**batch).logits)
    other = load(tmp_path, compute_dtype="fp32", kv_dtype="int8", deployment_mode=False)
    assert other.lm_head.compute == "fp32" and other.config.kv_cache_dtype == "int8"
    assert "forward" not in vars(other), "not deployed"
    with pytest.raises(ValueError, match="is quantized already"):
        load(tmp_path, load_in_8bit=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit are given; pass one"),
        ({"load_in_4bit": True, "load_in_low_bit": "nf4"}, "load_in_4bit and load_in_low_bit are given"),
        ({"load_in_low_bit": "sym_int5"}, "load_in_low_bit is 'sym_int5'; valid: sym_int4, .*weight_dtype"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: .*'bits'"),
        ({"quantization_config": 4}, "quantization_config is a int; valid: llm.WeightOnlyQuantConfig"),
        ({"dtype": torch.int8}, "dtype is torch.int8; valid"),
        ({"dtype": "float99"}, "dtype is 'float99'; valid"),
        ({"optimize_model": False}, "optimize_model: valid: True"),
        ({"device_map": {"model": "cpu", "lm_head": "cuda"}}, "a model runs on one device"),
        ({"output_loading_info": True}, "output_loading_info: the model is returned alone"),
        ({"load_in_4bit": True, "compute_dtype": "int3"}, "compute_dtype is 'int3'; valid"),
    ],
)
def test_unusable_arguments(options: dict[str, Any], message: str, plain: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(plain, **options)


def test_a_floating_point_directory_that_lacks_a_tensor(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"has no model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path)
