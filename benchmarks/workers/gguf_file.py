"""Writes a GGUF file with random weights in a model's shape: the dimensions come as JSON, the blocks are drawn directly.

Needs numpy and gguf; runs in the Python that has llama-cpp-python. ``python gguf_file.py OUT.gguf '{"hidden_size": ...}' q4_0``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np

#: transformers model_type -> architecture in the GGUF file.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen3": "qwen3"}


def q4_0(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Return blocks of 32: float16 scale, 16 bytes of codes. The weights' standard deviation is 1 / sqrt(columns)."""
    blocks = rng.integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
    blocks[..., :2] = _half(1 / (4.6 * columns**0.5))  # 4.6: standard deviation of uniform codes 0..15
    return blocks.reshape(rows, -1)


def q6_k(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Return super-blocks of 256: 128 + 64 bytes of codes, 16 int8 scales, float16 scale."""
    blocks = rng.integers(0, 256, (rows, columns // 256, 210), dtype=np.uint8)
    blocks[..., 192:208] = 64
    blocks[..., 208:] = _half(1 / (64 * 18.5 * columns**0.5))  # 18.5: standard deviation of uniform codes 0..63
    return blocks.reshape(rows, -1)


def q8_0(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Return blocks of 32: float16 scale, 32 int8 codes."""
    blocks = rng.integers(0, 256, (rows, columns // 32, 34), dtype=np.uint8)
    blocks[..., :2] = _half(1 / (73.9 * columns**0.5))
    return blocks.reshape(rows, -1)


def q4_k(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Return super-blocks of 256: float16 scales of the scales and of the minima, 12 bytes of 6-bit ones, 128 bytes of codes.

    Every scale and minimum is 32; the minima's scale is 7.5 times the other, so that the weights' mean is 0.
    """
    blocks = rng.integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
    scale = 1 / (32 * 4.6 * columns**0.5)
    blocks[..., :2], blocks[..., 2:4] = _half(scale), _half(7.5 * scale)
    blocks[..., 4:12] = 0xA0  # 32 for sub-blocks 0 to 3; the two high bits of those of 4 to 7
    blocks[..., 12:16] = 0
    return blocks.reshape(rows, -1)


def _half(value: float) -> np.ndarray:
    return np.array([value], np.float16).view(np.uint8)


FORMATS = {
    "q4_0": (q4_0, gguf.GGMLQuantizationType.Q4_0, 32),
    "q4_k": (q4_k, gguf.GGMLQuantizationType.Q4_K, 256),
    "q6_k": (q6_k, gguf.GGMLQuantizationType.Q6_K, 256),
    "q8_0": (q8_0, gguf.GGMLQuantizationType.Q8_0, 32),
}
#: Mixture -> (format of the layers, of the head), as llama.cpp's quantizer chooses them.
MIXTURES = {"q4_0": ("q4_0", "q6_k"), "q4_k_m": ("q4_k", "q6_k"), "q8_0": ("q8_0", "q8_0")}


def more_bits(layer: int, layers: int) -> bool:
    """Return whether Q4_K_M stores a layer's value and down projections in Q6_K: the first and last eighth, a third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def matrices(shape: dict[str, Any], mixture: str) -> Iterator[tuple[str, int, int, str]]:
    """Yield (name, outputs, inputs, format) of every layer's weights."""
    form = MIXTURES[mixture][0]
    hidden, inner, dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * dim, shape["num_key_value_heads"] * dim
    for i in range(shape["num_hidden_layers"]):
        for name, rows, columns in (
            ("attn_q", queries, hidden),
            ("attn_k", keys, hidden),
            ("attn_v", keys, hidden),
            ("attn_output", hidden, queries),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            better = mixture == "q4_k_m" and name in ("attn_v", "ffn_down") and more_bits(i, shape["num_hidden_layers"])
            yield f"blk.{i}.{name}.weight", rows, columns, "q6_k" if better else form


def write(path: str, shape: dict[str, Any], mixture: str) -> None:
    """Write the file.

    Args:
        path: of the file.
        shape: fields of a transformers config: model_type, hidden_size, intermediate_size, num_hidden_layers,
            num_attention_heads, num_key_value_heads, head_dim, vocab_size, max_position_embeddings, rms_norm_eps,
            rope_theta, tie_word_embeddings.
        mixture: q4_0, q4_k_m or q8_0.

    Raises:
        ValueError: an architecture that llama.cpp would read differently, or rows that no whole number of blocks fills.
    """
    if shape["model_type"] not in ARCHITECTURES:
        raise ValueError(f"model_type is {shape['model_type']!r}; this writer knows {', '.join(ARCHITECTURES)}")
    rng = np.random.default_rng(0)
    arch = ARCHITECTURES[shape["model_type"]]
    out = gguf.GGUFWriter(path, arch)
    out.add_context_length(shape["max_position_embeddings"])
    out.add_embedding_length(shape["hidden_size"])
    out.add_block_count(shape["num_hidden_layers"])
    out.add_feed_forward_length(shape["intermediate_size"])
    out.add_head_count(shape["num_attention_heads"])
    out.add_head_count_kv(shape["num_key_value_heads"])
    out.add_key_length(shape["head_dim"])
    out.add_value_length(shape["head_dim"])
    out.add_rope_dimension_count(shape["head_dim"])
    out.add_rope_freq_base(shape["rope_theta"])
    out.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    out.add_vocab_size(shape["vocab_size"])
    out.add_tokenizer_model("no_vocab")

    def add(name: str, rows: int, columns: int, form: str) -> None:
        draw, kind, block = FORMATS[form]
        if columns % block:
            raise ValueError(f"{name} has rows of {columns}; {form} stores blocks of {block}")
        out.add_tensor(name, draw(rows, columns, rng), raw_dtype=kind)

    def norm(name: str, size: int) -> None:
        out.add_tensor(name, np.ones(size, np.float32))

    layers, head = MIXTURES[mixture]
    add(
        "token_embd.weight", shape["vocab_size"], shape["hidden_size"], head if shape["tie_word_embeddings"] else layers
    )
    if not shape["tie_word_embeddings"]:
        add("output.weight", shape["vocab_size"], shape["hidden_size"], head)
    norm("output_norm.weight", shape["hidden_size"])
    for i in range(shape["num_hidden_layers"]):
        norm(f"blk.{i}.attn_norm.weight", shape["hidden_size"])
        norm(f"blk.{i}.ffn_norm.weight", shape["hidden_size"])
        if arch == "qwen3":
            norm(f"blk.{i}.attn_q_norm.weight", shape["head_dim"])
            norm(f"blk.{i}.attn_k_norm.weight", shape["head_dim"])
    for matrix in matrices(shape, mixture):
        add(*matrix)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    write(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
