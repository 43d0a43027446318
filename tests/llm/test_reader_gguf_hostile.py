"""GGUF files that lie: what is wrong is said, quickly and before memory is taken."""

import struct

import pytest
import torch
from gguf_files import F32, Q4_0, blocks, floats, string, value, write
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reader_gguf import tiny_file

from llmrt.llm.checkpoints.ggml_blocks import canonical_blocks
from llmrt.llm.checkpoints.gguf import load, read_model
from llmrt.llm.checkpoints.gguf_header import read_header

gguf = pytest.importorskip("gguf")

BLOCKS = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
BIG = 1 << 63
METADATA = {"general.architecture": "x", "x.list": [1, 2, 3], "x.names": ["a", "bc"], "x.real": 0.5, "x.on": True}


def small(path):
    data, _ = blocks(Q4_0, 3, 64)
    vector = floats(F32, torch.arange(5.0))
    return write(path, METADATA, {"w": (Q4_0, (3, 64), data), "v": (F32, (5,), vector)})


#: Sizes of a model of one layer.
SIZES = {
    "block_count": 1,
    "embedding_length": 64,
    "attention.head_count": 4,
    "feed_forward_length": 64,
    "vocab_size": 64,
}


def test_header(tmp_path):
    header = read_header(small(tmp_path / "small.gguf"), BLOCKS)
    assert header.values == {**METADATA, "x.list": 3, "x.names": 2}
    w, v = header.tensors["w"], header.tensors["v"]
    assert (w.shape, w.kind, w.size, v.shape, v.size) == ((3, 64), Q4_0, 3 * 2 * 18, (5,), 20)
    assert w.start % 32 == 0 and v.start == w.start + 128


def pair(key, item):
    return string(key) + (item if isinstance(item, bytes) else value(item))


ARCHITECTURE = pair("general.architecture", "x")


def header(*pairs, tensors=(), version=3, counts=None):
    counts = counts or (len(tensors), len(pairs))
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)


def tensor(name, *shape, kind=0, offset=0, dimensions=None):
    dimensions = len(shape) if dimensions is None else dimensions
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", dimensions, *shape, kind, offset)


LIES = {
    "empty": (b"", "it has 0 bytes"),
    "pickle": (b"PK\x03\x04" + bytes(60), "starts with b'PK"),
    "version": (header(ARCHITECTURE, version=1), "version is 1; valid: 2 and 3"),
    "big-endian": (header(ARCHITECTURE, version=3 << 24), "version is 50331648"),
    "tensors": (header(ARCHITECTURE, counts=(BIG, 1)), f"{BIG} tensors; valid: up to"),
    "pairs": (header(ARCHITECTURE, counts=(0, BIG)), f"{BIG} key-value pairs; valid: up to"),
    "no architecture": (header(pair("a", 1)), "no general.architecture"),
    "architecture": (header(pair("general.architecture", 7)), "no general.architecture"),
    "key length": (header(struct.pack("<Q", BIG) + bytes(40)), f"a key at byte 24 has {BIG} bytes; valid: up to 1024"),
    "string length": (header(pair("a", struct.pack("<IQ", 8, BIG))), f"a at byte 45 takes {BIG} bytes; the file has 0 more"),
    "array length": (header(ARCHITECTURE, pair("a", struct.pack("<IIQ", 9, 0, BIG))), f"{BIG} elements of a; valid: up to 0"),
    "array of strings": (header(ARCHITECTURE, pair("a", struct.pack("<IIQQ", 9, 8, 1, BIG))), f"a at byte .* takes {BIG} bytes"),
    "array of arrays": (header(ARCHITECTURE, pair("a", struct.pack("<IIQ", 9, 9, 1))), "a is an array of the type 9"),
    "type": (header(ARCHITECTURE, pair("a", struct.pack("<IQ", 99, 1))), "a has the type 99"),
    "twice": (header(ARCHITECTURE, ARCHITECTURE), "'general.architecture' is there twice"),
    "no text": (header(struct.pack("<Q", 2) + b"\xff\xfe" + bytes(40)), "can't decode byte"),
    "alignment": (header(ARCHITECTURE, pair("general.alignment", 3)), "general.alignment is 3; valid: a power of two"),
    "no alignment": (header(ARCHITECTURE, pair("general.alignment", 0)), "general.alignment is 0"),
    "dimensions": (header(ARCHITECTURE, tensors=[tensor("t", 1, dimensions=1 << 31)]), "has 2147483648 dimensions; valid: 1 to 4"),
    "no value": (header(ARCHITECTURE, tensors=[tensor("t", 0)]), r"'t' has the shape \[0\]; valid: no 0"),
    "product": (header(ARCHITECTURE, tensors=[tensor("t", BIG, 2, 2)]), f"'t' takes {BIG * 16} bytes"),
    "offset": (header(ARCHITECTURE, tensors=[tensor("t", 1, offset=BIG)]), "'t' takes 4 bytes from byte"),
    "odd offset": (header(ARCHITECTURE, tensors=[tensor("t", 1, offset=7)]), "offset 7; valid: multiples of 32"),
    "past the end": (header(ARCHITECTURE, tensors=[tensor("t", 64)]), "'t' takes 256 bytes from byte"),
    "ggml type": (header(ARCHITECTURE, tensors=[tensor("t", 1, kind=4)]), "'t' has the type 4; valid: 0, 1, 2"),
    "part of a block": (header(ARCHITECTURE, tensors=[tensor("t", 33, kind=2)]), "rows of a multiple of 32"),
    "shared bytes": (header(ARCHITECTURE, tensors=[tensor("t", 9), tensor("u", 9, offset=0)]) + bytes(99), "'t' and 'u' share bytes"),
    "second part": (header(ARCHITECTURE, pair("split.no", 1), pair("split.count", 2)), "part 1 of a split .*gguf-split --merge"),
    "split by name": (header(ARCHITECTURE, pair("split.no", 0), pair("split.count", 2)), "one of 2 files, but is not called .*--merge"),
    "same name": (header(ARCHITECTURE, tensors=[tensor("t", 1)] * 2) + bytes(64), "'t' is there twice"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies(tmp_path, lie):
    content, message = LIES[lie]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_too_many_elements(tmp_path):
    count = (1 << 21) + 1
    path = tmp_path / "many.gguf"
    path.write_bytes(header(ARCHITECTURE, pair("a", struct.pack("<IIQ", 9, 0, count)) + bytes(count)))
    with pytest.raises(ValueError, match=f"{count} elements of a; valid: up to {count - 1}"):
        load(path)


def test_metadata_that_contradict_the_tensors(tmp_path):
    tensors = {"token_embd.weight": (F32, (64, 64), floats(F32, torch.zeros(64, 64)))}
    for key, wrong, message in (
        ("block_count", 1 << 31, "num_hidden_layers is 2147483648; it has 1 tensors"),
        ("embedding_length", 1 << 31, "hidden_size is 2147483648; its largest tensor has a dimension of 64"),
        ("attention.head_count", [1, 1 << 20], "num_attention_heads is"),
        ("embedding_length", "wide", "no configuration can be made of its metadata"),
        ("rope.dimension_count", 1 << 31, "head_dim is 2147483648"),
    ):
        metadata = {
            "general.architecture": "llama",
            **{f"llama.{k}": item for k, item in {**SIZES, key: wrong}.items()},
        }
        write(tmp_path / "wrong.gguf", metadata, tensors)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "wrong.gguf")
    write(tmp_path / "wrong.gguf", {"general.architecture": "perceptron"}, tensors)
    with pytest.raises(ValueError, match="architecture perceptron is not supported"):
        load(tmp_path / "wrong.gguf")


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_damaged_scales(scale):
    data, _ = blocks(Q4_0, 2, 64, damaged=scale)
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(2, 2, 18)
    with pytest.raises(ValueError, match="w has a scale that is NaN or infinite"):
        canonical_blocks("w", "Q4_0", rows, torch.clone)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install llmrt\[gguf\]"):
        load(small(tmp_path / "small.gguf"))


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 600))
def test_any_bytes(tmp_path_factory, changes, cut):
    path = small(tmp_path_factory.mktemp("fuzz") / "small.gguf")
    content = bytearray(path.read_bytes())
    for position, byte in changes:
        content[position % len(content)] = byte
    path.write_bytes(content[: len(content) - max(0, cut - 500)])
    try:
        found = read_header(path, BLOCKS)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert all(t.start + t.size <= path.stat().st_size for t in found.tensors.values())
    reader = gguf.GGUFReader(path)  # what passed does not hang or surprise the package
    assert {t.name: t.n_bytes for t in reader.tensors} == {t.name: t.size for t in found.tensors.values()}


def test_parts_of_a_split_model(tmp_path):
    vector = {"v": (F32, (5,), floats(F32, torch.arange(5.0)))}
    first, second = (tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    split = {"split.no": 0, "split.count": 2, "split.tensors.count": 2}
    write(first, {**METADATA, **split}, vector)
    for metadata, tensors, message in (
        (None, None, "m-00002-of-00002.gguf is not there: the model is split into 2 files"),
        ({**split, "split.no": 1, "split.count": 3}, {"w": vector["v"]}, "does not belong to"),
        ({**split, "split.no": 1}, vector, "does not belong to .* tensors of another one"),
        (split, {"w": vector["v"]}, "not the part 2 of a split model .split.no 0"),
        (
            {**split, "split.no": 1},
            {"w": vector["v"], "x": vector["v"]},
            "says that its parts have 2 tensors; they have 3",
        ),
    ):
        if metadata is not None:
            write(second, metadata, tensors)
        with pytest.raises(ValueError, match=message):
            load(first)


def test_factors_that_are_no_frequencies(tmp_path):
    """A single one would be used for all."""
    metadata = {"general.architecture": "llama", **{f"llama.{k}": item for k, item in SIZES.items()}}
    embedding = (F32, (64, 64), floats(F32, torch.zeros(64, 64)))
    factors = (F32, (1,), floats(F32, torch.ones(1)))
    write(tmp_path / "wrong.gguf", metadata, {"token_embd.weight": embedding, "rope_freqs.weight": factors})
    with pytest.raises(ValueError, match=r"rope_freqs.weight has shape \[1\]; expected \[8\]"):
        load(tmp_path / "wrong.gguf")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "tiny.gguf"
    tiny_file(path, "qwen2", bias=True, head=Q4_0)
    start = min(t.start for t in read_header(path, BLOCKS).tensors.values())
    return path, path.read_bytes(), start


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=2))
def test_any_bytes_of_a_model(tiny, changes):
    """From the metadata to the model: what transformers makes of them is a model of the file's sizes or a ValueError."""
    path, content, start = tiny
    content = bytearray(content)
    for position, byte in changes:
        content[24 + position % (start - 24)] = byte
    path.write_bytes(content)
    try:
        model, _ = read_model(path, torch.float32)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert sum(p.numel() for p in model.parameters()) <= path.stat().st_size
