"""Worker of the comparisons: OpenVINO on a stateful Llama graph with random compressed weights, by raw infer requests.

The graph is what optimum-intel exports: compressed constants in front of MatMul, keys and values in variables that beam_idx
reorders, ScaledDotProductAttention; its CPU plugin fuses the same patterns (`facts["layers"]` counts what it made of them). Only the
last token's logits are computed. Activations are quantized in groups of --dynamic-group. A run feeds random tokens; nothing but the
request is timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo
from protocol import serve

CHUNK = 512
#: transformers model_type -> whether queries and keys are normalized per head.
MODELS = {"llama": False, "mistral": False, "qwen3": True}


def parse() -> argparse.Namespace:
    """Return the options."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("weights", choices=("int4", "int8"))
    options.add_argument("shape", type=json.loads, help="dimensions as JSON")
    options.add_argument("--threads", type=int, required=True)
    options.add_argument("--group-size", type=int, required=True, help="of INT4")
    options.add_argument(
        "--dynamic-group", type=int, required=True, help="inputs that share a scale of the activations"
    )
    options.add_argument("--kv", default="f16", choices=("f16", "bf16", "u8"), help="precision of keys and values")
    options.add_argument(
        "--precision", default="f32", choices=("f32", "bf16"), help="of everything between the products"
    )
    return options.parse_args()


class Graph:
    """Builds the model."""

    def __init__(self, shape: dict[str, Any], weights: str, group: int) -> None:
        """Take dimensions, the layers' format (the table and head are INT8) and INT4's group size."""
        if shape["model_type"] not in MODELS:
            raise ValueError(f"model_type is {shape['model_type']!r}; this graph knows {', '.join(MODELS)}")
        self.shape, self.weights, self.group = shape, weights, group
        self.rng = np.random.default_rng(0)
        self.weight_bytes = 0
        self.sinks: list[Any] = []
        self.batch: Any = None
        self.beams: Any = None

    def build(self) -> ov.Model:
        """Return the model: input_ids, position_ids [B, S] and beam_idx [B] to logits [B, 1, V]."""
        shape, hidden = self.shape, self.shape["hidden_size"]
        ids = op.parameter([-1, -1], np.int64, name="input_ids")
        positions = op.parameter([-1, -1], np.int64, name="position_ids")
        self.beams = op.parameter([-1], np.int32, name="beam_idx")
        self.batch = op.gather(op.shape_of(ids), _ints(0), _ints(0))
        table, table_bytes = self.compressed(shape["vocab_size"], hidden, "int8")
        x = op.gather(table, op.convert(ids, np.int32), _ints(0))
        cos, sin = self.rotation(positions)
        for layer in range(shape["num_hidden_layers"]):
            x = op.add(x, self.attention(self.norm(x, hidden), cos, sin, layer))
            x = op.add(x, self.feed_forward(self.norm(x, hidden)))
        last = op.slice(self.norm(x, hidden), _ints([-1]), _ints([np.iinfo(np.int64).max]), _ints([1]), _ints([1]))
        if shape["tie_word_embeddings"]:
            self.weight_bytes += table_bytes
            logits = op.matmul(last, table, False, True)
        else:
            logits = self.linear(last, shape["vocab_size"], hidden, "int8")
        result = op.result(logits, name="logits")
        return ov.Model([result], self.sinks, [ids, positions, self.beams], "llama")

    def compressed(self, n: int, k: int, weights: str) -> tuple[Any, int]:
        """Return (a weight [n, k] that is decompressed from random codes, its bytes); nncf's symmetric forms."""
        if weights == "int4":
            codes = self.rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
            tensor = ov.Tensor(codes, ov.Shape([n, k // self.group, self.group]), ov.Type.i4)
            scales = np.full((n, k // self.group, 1), 1 / (4.6 * k**0.5), np.float16)
        else:
            tensor = ov.Tensor(self.rng.integers(-127, 128, (n, k), dtype=np.int8))
            scales = np.full((n, 1), 1 / (73.3 * k**0.5), np.float16)
        value = op.multiply(op.convert(op.constant(tensor, shared_memory=False), np.float16), op.constant(scales))
        if weights == "int4":
            value = op.reshape(value, _ints([n, k]), False)
        return op.convert(value, np.float32), tensor.byte_size + scales.nbytes

    def linear(self, x: Any, n: int, k: int, weights: str = "") -> Any:
        weight, size = self.compressed(n, k, weights or self.weights)
        self.weight_bytes += size
        return op.matmul(x, weight, False, True)

    def norm(self, x: Any, size: int) -> Any:
        """Return RMSNorm(x) in the form that the plugin fuses."""
        mean = op.reduce_mean(op.power(x, _floats(2)), _ints([-1]), True)
        scale = op.divide(_floats(1), op.sqrt(op.add(mean, _floats(self.shape["rms_norm_eps"]))))
        return op.multiply(op.constant(np.ones((1, 1, size), np.float32)), op.multiply(x, scale))

    def rotation(self, positions: Any) -> tuple[Any, Any]:
        """Return cosines and sines [B, 1, S, D]."""
        half = np.arange(0, self.shape["head_dim"], 2, dtype=np.float32) / self.shape["head_dim"]
        frequencies = (self.shape["rope_theta"] ** -half).astype(np.float32).reshape(1, -1, 1)
        columns = op.broadcast(
            op.constant(frequencies),
            op.concat([op.unsqueeze(self.batch, _ints(0)), _ints([1, 1])], 0),
            broadcast_spec="BIDIRECTIONAL",
        )
        angles = op.matmul(columns, op.convert(op.unsqueeze(positions, _ints(1)), np.float32), False, False)
        angles = op.transpose(angles, _ints([0, 2, 1]))
        angles = op.concat([angles, angles], -1)
        return op.unsqueeze(op.cos(angles), _ints(1)), op.unsqueeze(op.sin(angles), _ints(1))

    def rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        """Return a half-rotated [B, H, S, D]."""
        half, end, one, axis = self.shape["head_dim"] // 2, np.iinfo(np.int64).max, _ints([1]), _ints([3])
        first = op.slice(x, _ints([0]), _ints([half]), one, axis)
        second = op.slice(x, _ints([half]), _ints([end]), one, axis)
        turned = op.concat([op.multiply(second, op.constant(np.full((1, 1, 1, 1), -1, np.float32))), first], -1)
        return op.add(op.multiply(x, cos), op.multiply(turned, sin))

    def heads(self, x: Any, count: int, normed: bool) -> Any:
        """Return [B, S, heads * D] as [B, heads, S, D]."""
        dim = self.shape["head_dim"]
        x = op.reshape(x, _ints([0, 0, count, dim]), True)
        return op.transpose(self.norm(x, dim) if normed else x, _ints([0, 2, 1, 3]))

    def attention(self, x: Any, cos: Any, sin: Any, layer: int) -> Any:
        shape, hidden, dim = self.shape, self.shape["hidden_size"], self.shape["head_dim"]
        queries, keys, normed = shape["num_attention_heads"], shape["num_key_value_heads"], MODELS[shape["model_type"]]
        query = self.rotate(self.heads(self.linear(x, queries * dim, hidden), queries, normed), cos, sin)
        key = self.rotate(self.heads(self.linear(x, keys * dim, hidden), keys, normed), cos, sin)
        value = self.heads(self.linear(x, keys * dim, hidden), keys, False)
        key, value = (
            self.cached(new, f"past_key_values.{layer}.{name}") for new, name in ((key, "key"), (value, "value"))
        )
        y = op.scaled_dot_product_attention(query, key, value, causal=True)
        y = op.reshape(op.transpose(y, _ints([0, 2, 1, 3])), _ints([0, 0, queries * dim]), True)
        return self.linear(y, hidden, queries * dim)

    def cached(self, new: Any, name: str) -> Any:
        """Append [B, Hk, S, D] to a variable and return all of it, a head for every query head: [B, H, T, D]."""
        shape, dim = self.shape, self.shape["head_dim"]
        keys, share = shape["num_key_value_heads"], shape["num_attention_heads"] // shape["num_key_value_heads"]
        empty = op.broadcast(_floats(0), op.concat([op.unsqueeze(self.batch, _ints(0)), _ints([keys, 0, dim])], 0))
        info = VariableInfo()
        info.data_shape, info.data_type, info.variable_id = ov.PartialShape([-1, keys, -1, dim]), ov.Type.f32, name
        variable = Variable(info)
        past = op.gather(op.read_value(empty, variable), self.beams, _ints(0))
        whole = op.concat([past, new], 2)
        self.sinks.append(op.assign(whole, variable))
        if share == 1:
            return whole
        target = op.concat([op.unsqueeze(self.batch, _ints(0)), _ints([keys, share, 1, dim])], 0)
        wide = op.broadcast(op.unsqueeze(whole, _ints(2)), target, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(wide, _ints([0, keys * share, -1, dim]), True)

    def feed_forward(self, x: Any) -> Any:
        hidden, inner = self.shape["hidden_size"], self.shape["intermediate_size"]
        gate = op.swish(self.linear(x, inner, hidden))
        return self.linear(op.multiply(gate, self.linear(x, inner, hidden)), hidden, inner)


def _ints(value: Any) -> Any:
    return op.constant(np.array(value, np.int64))


def _floats(value: float) -> Any:
    return op.constant(np.array(value, np.float32))


class Requests:
    """Feeds random tokens to a compiled model."""

    def __init__(self, compiled: Any, vocabulary: int) -> None:
        """Begin with an empty cache."""
        self.request = compiled.create_infer_request()
        self.vocabulary = vocabulary
        self.rng = np.random.default_rng(0)
        #: (sequences, tokens) -> keys and values of every layer, of the depth that was computed last.
        self.kept: dict[tuple[int, int], list[ov.Tensor]] = {}

    def feed(self, batch: int, begin: int, end: int) -> None:
        """Append the tokens of positions `begin` to `end` to all sequences."""
        positions = np.arange(begin, end, dtype=np.int64)
        self.request.infer(
            {
                "input_ids": self.rng.integers(0, self.vocabulary, (batch, end - begin), dtype=np.int64),
                "position_ids": np.tile(positions, (batch, 1)),
                "beam_idx": np.arange(batch, dtype=np.int32),
            },
            share_inputs=True,
            share_outputs=True,
        )

    def start(self, batch: int, depth: int) -> None:
        """Leave `depth` tokens of each sequence in the cache, computed now unless the last run had the same."""
        self.request.reset_state()
        if (batch, depth) in self.kept:
            for state, tensor in zip(self.request.query_state(), self.kept[batch, depth], strict=True):
                state.state = tensor
            return
        self.kept.clear()
        for begin in range(0, depth, CHUNK):
            self.feed(batch, begin, min(begin + CHUNK, depth))
        if depth:
            self.kept[batch, depth] = [_copy(state.state) for state in self.request.query_state()]


def _copy(tensor: ov.Tensor) -> ov.Tensor:
    return ov.Tensor(np.array(tensor.data))


def load(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[..., dict[str, float]]]:
    """Build and compile the model and return (facts, function of one run)."""
    start = time.perf_counter()
    graph = Graph(args.shape, args.weights, args.group_size)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": args.threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": True,
        "INFERENCE_PRECISION_HINT": args.precision,
        "KV_CACHE_PRECISION": args.kv,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": args.dynamic_group,
    }
    compiled = ov.Core().compile_model(graph.build(), "CPU", settings)
    layers = Counter(node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops())
    facts = {
        "load_s": time.perf_counter() - start,
        "version": ov.get_version(),
        "weight_bytes": graph.weight_bytes,
        "unit": "int8",
        "kv": args.kv,
        "settings": settings,
        "layers": dict(layers),
    }
    requests = Requests(compiled, args.shape["vocab_size"])

    def run(prompt: int, new: int, depth: int, batch: int, beams: int) -> dict[str, float]:
        if beams != 1:
            raise ValueError(f"beams is {beams}; raw requests have no beam search")
        requests.start(batch, depth)
        begin = time.perf_counter()
        requests.feed(batch, depth, depth + prompt)
        first = time.perf_counter()
        for position in range(depth + prompt, depth + prompt + new - 1):
            requests.feed(batch, position, position + 1)
        return {"first_token_s": first - begin, "decode_s": time.perf_counter() - first}

    return facts, run


if __name__ == "__main__":
    options = parse()
    serve(lambda: load(options))
