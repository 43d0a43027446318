"""Untouched models: every layer's attention becomes one operator, whatever form the family writes it in."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from models import PAD, VOCAB, error, padded_batch

from llmrt.passes import llmrt_backend

NAMES = ["attention", "attention, written out"]
FALCON = {"hidden_size": 48, "num_attention_heads": 4}

#: family -> class of the model, options of its configuration, how attention is written, calls of it in a layer.
FAMILIES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "Llama": ("LlamaForCausalLM", {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}, 0, 1),
    "Gemma2": (
        "Gemma2ForCausalLM",
        {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},
        1,
        1,
    ),
    "GPTJ": ("GPTJForCausalLM", {"n_embd": 48, "n_head": 4, "rotary_dim": 8}, 1, 1),
    "CodeGen": ("CodeGenForCausalLM", {"n_embd": 48, "n_head": 4, "rotary_dim": 8}, 1, 1),
    "Bloom": ("BloomForCausalLM", {"hidden_size": 48, "n_head": 4}, 1, 1),
    "Mpt": ("MptForCausalLM", {"d_model": 48, "n_heads": 4, "max_seq_len": 64}, 1, 1),
    "Falcon": ("FalconForCausalLM", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, 0, 1),
    "Falcon of one key head": ("FalconForCausalLM", {**FALCON, "multi_query": True}, 0, 1),
    "Falcon with ALiBi": ("FalconForCausalLM", {**FALCON, "multi_query": False, "alibi": True}, 0, 1),
    "GPTBigCode": ("GPTBigCodeForCausalLM", {"n_embd": 48, "n_head": 4}, 0, 1),
    "OPT": ("OPTForCausalLM", {"hidden_size": 48, "num_attention_heads": 4, "word_embed_proj_dim": 48}, 0, 1),
    "T5": ("T5ForConditionalGeneration", {"d_model": 48, "d_kv": 12, "d_ff": 80, "num_heads": 4}, 0, 3),
}
EAGER = ("Llama", "Falcon with ALiBi", "OPT", "T5")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(family: str, **more: Any) -> Any:
    name, options, _, _ = FAMILIES[family]
    torch.manual_seed(3)
    config_class = getattr(transformers, name).config_class
    layers = config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    marks = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    config = config_class(**marks, **options, **{layers: 1}, **more)
    model = getattr(transformers, name)(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5 * 1.5)
    return model


def check(model: Any, form: int, calls: int) -> None:
    """Compare a prompt's logits and those of the next token, with a cache, and count what fired."""
    reports: list[Any] = []
    compiled = torch.compile(
        model,
        backend=llmrt_backend,
        dynamic=True,
        fullgraph=True,
        options={"passes": NAMES, "strict": True, "report": reports},
    )
    batch = padded_batch(2, 9)
    mask, past = batch["attention_mask"], {}
    two_stacks = model.config.is_encoder_decoder
    tokens = batch["input_ids"]
    for step in range(1 if two_stacks else 2):
        if two_stacks:
            inputs = {**batch, "decoder_input_ids": tokens[:, :4]}
        else:
            inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": True}
        with torch.inference_mode():
            expected, got = (run(**inputs, past_key_values=past.get(run)) for run in (model, compiled))
        past = {model: expected.past_key_values, compiled: got.past_key_values}
        shown = None if two_stacks or step else mask
        assert error(got.logits, expected.logits, shown) < 1e-5
        assert {name: n for name, n in reports[-1].fired.items() if n} == {NAMES[form]: calls}
        assert not [miss for miss in reports[-1].near_misses if miss.rewrite in NAMES]
        tokens = tokens[:, :1]
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    assert len(reports) == (1 if two_stacks else 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer(family: str) -> None:
    _, _, form, calls = FAMILIES[family]
    check(model_of(family), form, calls)


@pytest.mark.parametrize("family", EAGER)
def test_every_layer_without_torchs_call(family: str) -> None:
    check(model_of(family, attn_implementation="eager"), 1, FAMILIES[family][3])
