"""torchao's quantization for the CPU, applied to a transformers model: its INT4 weights, or INT8 weights and activations."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn


def quantize(model: nn.Module, weights: str, group_size: int, folder: Path) -> int:
    """Quantize every linear of a bfloat16 model in place, the head included, and return the bytes of their weights.

    Args:
        model: the model.
        weights: int4: weight-only in the CPU's packed form; int8: rows of weights and activations, for inductor.
        group_size: of INT4.
        folder: where benchmarks/install_peers.py put torchao.

    Raises:
        RuntimeError: torchao is not there.
    """
    sys.path.append(str(folder))
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise RuntimeError(f"torchao is not in {folder}; benchmarks/install_peers.py installs it ({error})") from error
    config: Any = Int8DynamicActivationInt8WeightConfig()
    if weights == "int4":
        config = PrototypeInt4WeightOnlyConfig(group_size=group_size)
    untie_head(model)
    quantize_(model, config)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return sum(_stored_bytes(linear.weight) for linear in linears)


def _stored_bytes(weight: Any) -> int:
    parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return sum(part.numel() * part.element_size() for part in parts)


def untie_head(model: Any) -> None:
    """Give the head a parameter of its own: the embedding table that it shares stays as it is."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach(), requires_grad=False)
