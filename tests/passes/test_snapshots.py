"""The rewritten graphs of one decoder layer, as text: what a change of the passes does to them shows here."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from expecttest import assert_expected_inline
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from llmrt.passes import retrace, rewrite

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def short(name: str) -> str:
    """Shorten Dynamo's names of parameters and buffers to their last part."""
    name = re.sub(r"\bl_\w*_modules_(\w+?)_?\b", r"\1", name).replace("_parameters_", ".")
    return re.sub(r"\bl_\w*past_key_values_layers_(\d+)_(\w+?)_?\b", r"cache\1_\2", name)


def text(gm: torch.fx.GraphModule) -> str:
    """Return the graph with one line per call."""
    lines = []
    for node in gm.graph.nodes:
        if node.op == "call_function":
            name = str(node.target).removesuffix(".default")
            name = "getitem" if "getitem" in name else name
            operands = (short(str(a)) if not isinstance(a, float) else f"{a:g}" for a in node.args)
            lines.append(f"{short(node.name)} = {name}({', '.join(operands)})")
    return "\n".join(lines) + "\n"


def decode_graph(model: Any) -> str:
    """Return the text of the graph of a decode step over a static cache, from the first norm of the layer on."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        traced = retrace(gm, inputs)
        rewrite(traced, strict=True)
        graphs.append(traced)
        return gm.forward

    torch._dynamo.reset()
    cache = StaticCache(model.config, max_cache_len=32)
    ids = torch.randint(0, 96, (2, 7))
    with torch.inference_mode():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for part in (ids, ids[:, :1]):
            compiled(part, past_key_values=cache)
    lines = text(graphs[-1]).splitlines()
    start = next(i for i, line in enumerate(lines) if "_norm(" in line)
    return "\n".join(lines[start:]) + "\n"


def test_llama_layer() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval().bfloat16()
    assert_expected_inline(
        decode_graph(model),
        """\
rms_norm_default = llmrt.rms_norm(embedding, input_layernorm.weight, 1e-06, 0)
parallel_linear_default = llmrt.parallel_linear(rms_norm_default, [q_proj.weight, k_proj.weight, v_proj.weight], [None, None, None])
getitem_6 = getitem(parallel_linear_default, 0)
getitem_7 = getitem(parallel_linear_default, 1)
getitem_8 = getitem(parallel_linear_default, 2)
reshape_default = aten.reshape(getitem_6, [2, 1, 4, 16])
reshape_default_1 = aten.reshape(getitem_7, [2, 1, 2, 16])
reshape_default_2 = aten.reshape(getitem_8, [2, 1, 2, 16])
rope_append_default = llmrt.rope_append(reshape_default, reshape_default_1, reshape_default_2, to_3, to_4, cache0_keys, cache0_values, 0, 1, None, None, 0, False, None, None, 1e-06, 0, cache0_cumulative_length)
attention_default = llmrt.attention(rope_append_default, cache0_keys, cache0_values, 32, 0.25, False, 0, 0, le)
reshape_default_3 = aten.reshape(attention_default, [2, 1, 64])
dense_linear_default = llmrt.dense_linear(reshape_default_3, o_proj.weight, None, None, none)
add_rms_norm_default = llmrt.add_rms_norm(embedding, dense_linear_default, post_attention_layernorm.weight, 1e-06, 0)
getitem_2 = getitem(add_rms_norm_default, 0)
getitem_3 = getitem(add_rms_norm_default, 1)
gated_linear_default = llmrt.gated_linear(getitem_2, gate_proj.weight, up_proj.weight, None, None, silu)
dense_linear_default_1 = llmrt.dense_linear(gated_linear_default, down_proj.weight, None, None, none)
add_rms_norm_default_1 = llmrt.add_rms_norm(getitem_3, dense_linear_default_1, norm.weight, 1e-06, 0)
getitem_4 = getitem(add_rms_norm_default_1, 0)
dense_linear_default_2 = llmrt.dense_linear(getitem_4, lm_head.weight, None, None, none)
""",
    )


def test_gpt_neox_layer() -> None:
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)).eval().bfloat16()
    assert_expected_inline(
        decode_graph(model),
        """\
layer_norm_default = llmrt.layer_norm(embedding, input_layernorm.weight, input_layernorm.bias, 1e-05)
dense_linear_default_2 = llmrt.dense_linear(layer_norm_default, query_key_value.weight, query_key_value.bias, None, none)
reshape_default = aten.reshape(dense_linear_default_2, [2, 1, 4, 48])
permute_default = aten.permute(reshape_default, [0, 2, 1, 3])
slice_tensor = aten.slice.Tensor(permute_default, 3, 0, 16)
slice_tensor_1 = aten.slice.Tensor(permute_default, 3, 16, 32)
slice_tensor_2 = aten.slice.Tensor(permute_default, 3, 32, 48)
permute_default_2 = aten.permute(slice_tensor, [0, 2, 1, 3])
permute_default_3 = aten.permute(slice_tensor_1, [0, 2, 1, 3])
permute_default_7 = aten.permute(slice_tensor_2, [0, 2, 1, 3])
rope_append_default = llmrt.rope_append(permute_default_2, permute_default_3, permute_default_7, to_3, to_4, cache0_keys, cache0_values, 0, 1, None, None, 4, False, None, None, 1e-06, 0, cache0_cumulative_length)
attention_default = llmrt.attention(rope_append_default, cache0_keys, cache0_values, 32, 0.25, False, 0, 0, le)
reshape_default_1 = aten.reshape(attention_default, [2, 1, 64])
dense_linear_default_3 = llmrt.dense_linear(reshape_default_1, dense.weight, dense.bias, None, none)
layer_norm_default_1 = llmrt.layer_norm(embedding, post_attention_layernorm.weight, post_attention_layernorm.bias, 1e-05)
dense_linear_default = llmrt.dense_linear(layer_norm_default_1, dense_h_to_4h.weight, dense_h_to_4h.bias, None, gelu)
dense_linear_default_1 = llmrt.dense_linear(dense_linear_default, dense_4h_to_h.weight, dense_4h_to_h.bias, dense_linear_default_3, add)
add_layer_norm_default = llmrt.add_layer_norm(dense_linear_default_1, embedding, final_layer_norm.weight, final_layer_norm.bias, 1e-05)
getitem_5 = getitem(add_layer_norm_default, 0)
dense_linear_default_4 = llmrt.dense_linear(getitem_5, lm_head.weight, None, None, none)
""",
    )
