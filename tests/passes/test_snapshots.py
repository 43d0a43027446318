"""The rewritten graphs of one decoder layer, as text: what a change of the passes does to them shows here."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
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
    name = re.sub(r"^l_.*_modules_", "", name)
    return re.sub(r"^l_.*past_key_values_layers_(\d+)_", r"cache\1_", name).removesuffix("_")


def text(gm: torch.fx.GraphModule) -> str:
    """Return the graph with one line per call that computes, views left out of the count but shown."""
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


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_llama_layer() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval().bfloat16()
    assert_expected_inline(decode_graph(model), """""")


def test_gpt_neox_layer() -> None:
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)).eval().bfloat16()
    assert_expected_inline(decode_graph(model), """""")
