"""What a GGUF file holds, from its header alone, with every count, length, size and offset checked against the file's size.

A file comes from strangers: a count of 2^63 in it must not become a loop or memory. Layout (all little-endian): "GGUF", uint32
version, uint64 tensors, uint64 key-value pairs; pairs of a string, a uint32 type and a value; for each tensor a string, uint32
dimensions, uint64 each of them (the fastest first), uint32 type, uint64 offset; the data, from the next multiple of
``general.alignment`` on. A string is a uint64 length and UTF-8; an array a uint32 type, a uint64 count and the elements.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
#: struct codes of the scalar types by their numbers; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
#: A vocabulary of 256k tokens with scores, types and merges has 1.3 million elements. What reads them later takes about
#: 250 bytes for each, so that a file of a few MB could ask for all memory.
MAX_ELEMENTS = 1 << 21
MAX_PAIRS = MAX_TENSORS = 1 << 16
_MERGE = "give the first part, or join them: gguf-split --merge FIRST-PART.gguf WHOLE.gguf"
MAX_NAME, MAX_DIMENSIONS, MAX_ALIGNMENT = 1024, 4, 1 << 16


class TensorInfo(NamedTuple):
    """One tensor of a file.

    Args:
        name: in the file.
        shape: in torch's order.
        kind: number of its ggml type.
        start: of its bytes in the file.
        size: in bytes.
        path: of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    size: int
    path: str


class Header(NamedTuple):
    """Metadata and tensors of a file.

    Args:
        values: scalars and strings by key; of an array its number of elements.
        tensors: by name.
    """

    values: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_parts(path: str | os.PathLike[str], blocks: Mapping[int, tuple[int, int]]) -> Header:
    """Return the header of a file, or of a model that is split into files (part-00001-of-00003.gguf, ...): the first has the metadata.

    Args: as of `read_header`; path: of the first part.

    Raises:
        ValueError: as `read_header`; a part is not there, or is none of this model.
    """
    path = os.fspath(path)
    header = read_header(path, blocks)
    parts = header.values.get("split.count", 1)
    if parts in (0, 1):
        return header
    name = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path, re.DOTALL)
    if name is None or int(name[2]) != parts or header.values.get("split.no") != 0:
        raise ValueError(
            f"{path} says that it is one of {parts!r:.40} files, but is not called ...-00001-of-0000N.gguf; {_MERGE}"
        )
    tensors = dict(header.tensors)
    for number in range(1, parts):
        part = f"{name[1]}-{number + 1:05d}-of-{parts:05d}.gguf"
        if not os.path.isfile(part):
            raise ValueError(
                f"{part} is not there: the model is split into {parts} files, which must lie together; {_MERGE}"
            )
        found = read_header(part, blocks, number)
        if found.values.get("split.count") != parts or not tensors.keys().isdisjoint(found.tensors):
            raise ValueError(f"{part} does not belong to {path}: it counts other parts, or has tensors of another one")
        tensors.update(found.tensors)
    if header.values.get("split.tensors.count", len(tensors)) != len(tensors):
        raise ValueError(
            f"{path} says that its parts have {header.values['split.tensors.count']!r:.40} tensors; they have {len(tensors)}"
        )
    return Header(header.values, tensors)


def read_header(path: str | os.PathLike[str], blocks: Mapping[int, tuple[int, int]], part: int = 0) -> Header:
    """Return the header of a file.

    Args:
        path: of the file.
        blocks: number of a ggml type -> (values, bytes) of one block.
        part: number of the part of a split model, from 0 on.

    Raises:
        ValueError: it is no GGUF file, or something in it contradicts the file's size; the message says what.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not there; expected a GGUF file")
    size = os.path.getsize(path)
    if size < 24:
        raise ValueError(f"{path} is no GGUF file: it has {size} bytes")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return _Scan(content, size).header(path, blocks, part)
        except (ValueError, struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no usable GGUF file: {error}") from None


class _Scan:
    """Reads a file from its beginning."""

    def __init__(self, content: Any, size: int) -> None:
        self.content, self.size, self.position, self.elements = content, size, 0, 0

    def take(self, count: int, what: str) -> int:
        """Return where the next `count` bytes start; ValueError if the file ends before."""
        start = self.position
        if count > self.size - start:
            raise ValueError(f"{what} at byte {start} takes {count} bytes; the file has {self.size - start} more")
        self.position = start + count
        return start

    def number(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        return struct.unpack_from("<" + code, self.content, self.take(size, what))[0]

    def text(self, what: str) -> str:
        length = self.number("Q", f"the length of {what}")
        start = self.take(length, what)
        return bytes(self.content[start : start + length]).decode("utf-8")

    def name(self, what: str) -> str:
        start = self.position
        length = self.number("Q", f"the length of {what}")
        if length > MAX_NAME:
            raise ValueError(f"{what} at byte {start} has {length} bytes; valid: up to {MAX_NAME}")
        self.position = start
        return self.text(what)

    def count(self, number: int, least: int, most: int, what: str) -> int:
        """Return a number of things of `least` bytes and more each; ValueError if so many cannot be in the file."""
        if number > most or number * least > self.size - self.position:
            raise ValueError(
                f"{number} {what}; valid: up to {min(most, (self.size - self.position) // least)} in this file"
            )
        return number

    def value(self, kind: int, key: str) -> Any:
        """Return a scalar or a string; of an array its number of elements."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], key)
        if kind == _STRING:
            return self.text(key)
        if kind != _ARRAY:
            raise ValueError(f"{key} has the type {kind}; valid: 0 to 12")
        inner = self.number("I", key)
        if inner not in _SCALARS and inner != _STRING:
            raise ValueError(f"{key} is an array of the type {inner}; valid: 0 to 8, 10 to 12")
        size = struct.calcsize("<" + _SCALARS[inner]) if inner in _SCALARS else 8
        count = self.count(self.number("Q", key), size, MAX_ELEMENTS - self.elements, f"elements of {key}")
        self.elements += count
        if inner in _SCALARS:
            self.take(count * size, key)
        else:
            for _ in range(count):
                self.take(self.number("Q", key), key)
        return count

    def header(self, path: str, blocks: Mapping[int, tuple[int, int]], part: int) -> Header:
        """Return the header."""
        magic = bytes(self.content[self.take(4, "the magic") : 4])
        if magic != _MAGIC:
            raise ValueError(f"it starts with {magic!r}; expected {_MAGIC!r}")
        version = self.number("I", "the version")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}; valid: 2 and 3, little-endian")
        counts = (self.number("Q", "the number of tensors"), self.number("Q", "the number of pairs"))
        tensors = self.count(counts[0], 32, MAX_TENSORS, "tensors")
        values: dict[str, Any] = {}
        for _ in range(self.count(counts[1], 13, MAX_PAIRS, "key-value pairs")):
            key = self.name("a key")
            if key in values:
                raise ValueError(f"the key {key!r} is there twice")
            values[key] = self.value(self.number("I", f"the type of {key}"), key)
        if values.get("split.no", 0) != part:
            raise ValueError(
                f"it is not the part {part + 1} of a split model (split.no {values['split.no']!r:.40}); {_MERGE}"
            )
        if part == 0 and not isinstance(values.get("general.architecture"), str):
            raise ValueError("it has no general.architecture")
        rows: list[tuple[str, tuple[int, ...], int, int]] = [self.tensor() for _ in range(tensors)]
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}; valid: a power of two up to {MAX_ALIGNMENT}")
        data = -(-self.position // alignment) * alignment
        found: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in rows:
            if name in found:
                raise ValueError(f"the tensor {name!r} is there twice")
            if offset % alignment:
                raise ValueError(f"the tensor {name!r} has the offset {offset}; valid: multiples of {alignment}")
            size = _bytes(name, shape, kind, blocks)
            if data + offset + size > self.size:
                raise ValueError(
                    f"the tensor {name!r} takes {size} bytes from byte {data + offset} on; the file has {self.size}"
                )
            found[name] = TensorInfo(name, shape, kind, data + offset, size, path)
        ordered = sorted(found.values(), key=lambda t: t.start)
        for before, after in pairwise(ordered):
            if before.start + before.size > after.start:  # a small file could stand for any amount of memory
                raise ValueError(f"the tensors {before.name!r} and {after.name!r} share bytes")
        return Header(values, found)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return name, shape, type and offset of the next tensor."""
        name = self.name("a tensor's name")
        dimensions = self.number("I", f"the dimensions of {name}")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"the tensor {name!r} has {dimensions} dimensions; valid: 1 to {MAX_DIMENSIONS}")
        shape = tuple(self.number("Q", f"the shape of {name}") for _ in range(dimensions))[::-1]
        return name, shape, self.number("I", f"the type of {name}"), self.number("Q", f"the offset of {name}")


def _bytes(name: str, shape: tuple[int, ...], kind: int, blocks: Mapping[int, tuple[int, int]]) -> int:
    if kind not in blocks:
        raise ValueError(f"the tensor {name!r} has the type {kind}; valid: {', '.join(str(k) for k in sorted(blocks))}")
    values, size = blocks[kind]
    if not all(shape) or shape[-1] % values:
        raise ValueError(
            f"the tensor {name!r} has the shape {list(shape)}; valid: no 0, rows of a multiple of {values}"
        )
    return prod(shape) // values * size
