"""Writes small GGUF files, from the description of the format and not through the package gguf."""

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

F32, F16, Q4_0, Q5_0, Q8_0, Q6_K, IQ4_NL, BF16 = 0, 1, 2, 6, 8, 14, 20, 30
#: Values and bytes of a block.
BLOCKS = {
    F32: (1, 4),
    F16: (1, 2),
    BF16: (1, 2),
    Q4_0: (32, 18),
    Q5_0: (32, 22),
    Q8_0: (32, 34),
    Q6_K: (256, 210),
    IQ4_NL: (32, 18),
}
#: The integers that the codes of IQ4_NL stand for.
TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """Return type and bytes of a metadata value."""
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    inner = [value(part) for part in item]
    return struct.pack("<I", 9) + inner[0][:4] + struct.pack("<Q", len(inner)) + b"".join(part[4:] for part in inner)


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[int, tuple[int, ...], bytes]]) -> Path:
    """Write a file; tensors: name -> (ggml type, shape in torch's order, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(string(key) + value(item) for key, item in metadata.items())
    data = b""
    for name, (kind, shape, content) in tensors.items():
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(data))
        data += content + bytes(-len(content) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def blocks(kind: int, n: int, k: int, damaged: float | None = None) -> tuple[bytes, Tensor]:
    """Return random blocks of a weight [n, k] and the float32 values that they stand for; damaged: a scale."""
    scale = ((torch.rand(n, k // 32) - 0.5) / 4).half()
    scale[0, 0] = 0 if damaged is None else damaged
    codes = torch.randint(0, 256 if kind == Q8_0 else 32 if kind == Q5_0 else 16, (n, k // 32, 32))
    table = torch.tensor(TABLE)
    integers = {Q4_0: codes - 8, Q5_0: codes - 16, Q8_0: codes - 128, IQ4_NL: table[codes % 16]}[kind]
    parts = [scale.unsqueeze(-1).view(torch.uint8)]
    if kind == Q8_0:
        parts.append(integers.to(torch.int8).view(torch.uint8))
    else:
        if kind == Q5_0:
            high = ((codes >> 4) << torch.arange(32)).sum(-1, keepdim=True)
            parts.append(torch.cat([(high >> (8 * i)) & 255 for i in range(4)], -1).to(torch.uint8))
        low = codes & 15
        parts.append((low[..., :16] | (low[..., 16:] << 4)).to(torch.uint8))
    data = torch.cat(parts, -1).contiguous()
    weight = integers.float() * scale.float().unsqueeze(-1)
    return data.numpy().tobytes(), weight.flatten(1)


def floats(kind: int, values: Tensor) -> bytes:
    dtype = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}[kind]
    return values.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
