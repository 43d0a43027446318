"""Weights that the package compressed-tensors packs are read as it unpacks them; without the package these tests are skipped."""

import pytest
import torch

from llmrt.llm.checkpoints.compressed_tensors import CompressedTensorsReader
from llmrt.ops.formats import dequantize

pytest.importorskip("compressed_tensors")

NAME = "model.layers.0.mlp.down_proj"
CASES = [
    (form, bits, kind, strategy, symmetric, dtype)
    for form, bits, kind, strategies in (
        ("pack-quantized", 4, "int", ("group", "channel")),
        ("pack-quantized", 8, "int", ("group", "channel")),
        ("pack-quantized", 2, "int", ("group",)),
        ("int-quantized", 8, "int", ("channel", "tensor", "group")),
        ("float-quantized", 8, "float", ("channel", "tensor", "block")),
    )
    for strategy in strategies
    for symmetric in ((True, False) if kind == "int" else (True,))
    for dtype in (torch.bfloat16, torch.float32)
]


@pytest.mark.parametrize("form, bits, kind, strategy, symmetric, dtype", CASES)
def test_same_as_the_package(form, bits, kind, strategy, symmetric, dtype):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    n, k = 37, 96
    sizes = {"group": {"group_size": 32}, "block": {"block_structure": [16, 32]}, "channel": {"group_size": -1}}
    args = QuantizationArgs(num_bits=bits, type=kind, symmetric=symmetric, strategy=strategy, **sizes.get(strategy, {}))
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    blocks = {"group": (n, 3), "channel": (n, 1), "tensor": (1,), "block": (3, 3)}[strategy]
    top = 448 if kind == "float" else 1 << (bits - 1)
    state = {"weight": torch.randn(n, k).to(dtype), "weight_scale": ((0.5 + torch.rand(blocks)) * 2 / top).to(dtype)}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-top, top, blocks).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]

    groups = {"group_0": scheme.model_dump(mode="json")}
    reader = CompressedTensorsReader({"quant_method": "compressed-tensors", "format": form, "config_groups": groups})
    weight = reader.read(NAME, k, n, stored)
    got = dequantize(*weight.canonical, weight.layout, k)
    assert expected.dtype == dtype and torch.equal(got.to(dtype), expected)
