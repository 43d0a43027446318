"""The weight files of a checkpoint: which tensors are where, known from the headers, and read one by one."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .reader import Entry

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_SHARES = 4  # a tied weight stands in a torch file under two names


class TensorFiles:
    """The tensors of several files under their names. Nothing but headers is read before `read`.

    Args:
        paths: safetensors, or torch files, which are loaded with weights_only=True: a pickle that would run code is refused.

    Raises:
        ValueError: a file is damaged, has a dtype that torch lacks, or two files have a tensor of the same name.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        """Read the headers."""
        self.entries: dict[str, Entry] = {}
        self._owner: dict[str, Any] = {}
        self._file: dict[str, str] = {}
        for path in (os.fspath(p) for p in paths):
            self._add(path, *(_open_safetensors(path) if path.endswith(".safetensors") else _open_pickle(path)))

    def _add(self, path: str, owner: Any, entries: dict[str, Entry]) -> None:
        for name, entry in entries.items():
            if name in self.entries:
                raise ValueError(f"{name} is in two files, {os.path.basename(self._file[name])} and {Path(path).name}")
            self.entries[name], self._owner[name], self._file[name] = entry, owner, path

    def read(self, name: str) -> Tensor:
        """Return one tensor in memory of its own."""
        owner = self._owner[name]
        if isinstance(owner, dict):
            return owner[name].clone()
        try:
            return owner.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self._file[name]}: {name} cannot be read: {error}") from None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(prod(entry.shape) * entry.dtype.itemsize for entry in self.entries.values())

    def groups(self) -> dict[str, dict[str, Entry]]:
        """Return the entries by what stands before and behind the last dot of their names."""
        return by_prefix(self.entries)


def _open_safetensors(path: str) -> tuple[Any, dict[str, Entry]]:
    """Return a handle that reads into memory of its own (a mapping of the file would grow with every tensor) and the entries."""
    try:
        handle = safe_open(path, framework="pt", device="cpu", backend="pread")
        entries = {}
        for name in handle.keys():  # noqa: SIM118 - not a dict
            found = handle.get_slice(name)
            dtype = found.get_dtype()
            if dtype not in _DTYPES:
                raise ValueError(f"{path}: {name} has dtype {dtype}; valid: {', '.join(_DTYPES)}")
            entries[name] = Entry(tuple(found.get_shape()), _DTYPES[dtype])
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from None
    return handle, entries


def _open_pickle(path: str) -> tuple[dict[str, Tensor], dict[str, Entry]]:
    """Load a torch file: an archive is mapped, so that nothing but its list of tensors is read here; the format before it is read whole."""
    mapped = is_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a stranger's bytes make the unpickler raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no file of tensors (torch.load with weights_only=True: {first})") from None
    entries = entries_of(state, path)
    size, total = os.path.getsize(path), sum(tensor.nbytes for tensor in state.values())
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in state.values()}
    if sum(storages.values()) > size or total > _SHARES * size:  # tensors may be views that repeat a few bytes
        raise ValueError(f"{path} has {size} bytes, but tensors of {max(total, sum(storages.values()))} bytes")
    return state, entries


def is_archive(path: str) -> bool:
    """Return whether a torch file is an archive; ValueError if it is compressed, which torch would map as it is."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
    except Exception as error:  # whatever a stranger's bytes make zipfile raise
        raise ValueError(f"{path} is no file of tensors ({error})") from None
    if compressed:
        raise ValueError(f"{path} is compressed; torch.save stores tensors as they are")
    return True


def by_prefix(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """Return entries by what stands before and behind the last dot of their names."""
    found: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        prefix, _, suffix = name.rpartition(".")
        found.setdefault(prefix, {})[suffix] = entry
    return found


def entries_of(state: Any, source: str) -> dict[str, Entry]:
    """Return shapes and dtypes of a state dict; ValueError unless it maps names to tensors."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} holds a {type(state).__name__}; expected a dict of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{source}: {name!r} is a {type(tensor).__name__}; expected names and tensors")
        if tensor.layout is not torch.strided or tensor.is_meta:
            kind = "on the meta device" if tensor.is_meta else tensor.layout
            raise ValueError(f"{source}: {name} is {kind}; expected a dense tensor with values")
    return {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def weight_files(directory: str, named: Any = None, variant: Any = None, safetensors: bool | None = None) -> list[str]:
    """Return the files that transformers loads from a directory, none if it has none. An index is checked against them.

    Args:
        directory: of the files.
        named: a file that the configuration names ("transformers_weights"), in place of the usual ones.
        variant: between a name and its end: model.fp16.safetensors.
        safetensors: True or False: only these, only torch files.

    Raises:
        ValueError: the index is damaged, names a tensor twice, a file outside the directory or one that is not there, or a tensor
            that its file lacks.
    """
    endings = [
        e for e, skipped in ((".safetensors", safetensors is False), (".bin", safetensors is True)) if not skipped
    ]
    stems = [("model" if ending == ".safetensors" else "pytorch_model", ending) for ending in endings]
    part = f".{variant}" if variant else ""
    names = [name for stem, end in stems for name in (f"{stem}{part}{end}", f"{stem}{end}.index{part}.json")]
    if named is not None:
        if not isinstance(named, str) or os.path.isabs(named) or ".." in Path(named).parts:
            raise ValueError(f"transformers_weights is {named!r:.200}; valid: a file of the directory itself")
        names = [named]
    found = next((path for name in names if os.path.isfile(path := os.path.join(directory, name))), None)
    if found is None:
        return []
    return _shards(found, directory) if found.endswith(".json") else [found]


def _shards(index: str, directory: str) -> list[str]:
    """Return the files of an index, checked; see `weight_files`."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(v, str) for v in shards.values()):
        raise ValueError(f"{index} is no usable index: weight_map does not map names of tensors to names of files")
    names = list(dict.fromkeys(shards.values()))
    for name in names:
        if os.path.basename(name) != name or name in ("", ".", "..") or "\0" in name:
            raise ValueError(f"{index} names the file {name!r:.200}; valid: files of the directory itself")
        if not os.path.isfile(os.path.join(directory, name)):
            raise ValueError(f"{index} names {name:.200}, which is not there: the checkpoint is not complete")
    paths = [os.path.join(directory, name) for name in names]
    if all(name.endswith(".safetensors") for name in names):
        files = TensorFiles(paths)
        for tensor, name in shards.items():
            if os.path.basename(files._file.get(tensor, "")) != name:
                raise ValueError(f"{index} says that {tensor} is in {name}, which has no such tensor")
    return paths


def read_json(path: str) -> dict[str, Any]:
    """Return the object of a JSON file; ValueError, which names the file, if it is damaged, holds anything else or a name twice."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no usable JSON: {error!s:.200}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected an object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name!r} is there twice")
        result[name] = value
    return result
