"""The weight files of a checkpoint: which tensors are where, known from the headers, and read one by one."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .reader import Entry

INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


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
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the old format cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no file of tensors (torch.load with weights_only=True: {first})") from None
    return state, entries_of(state, path)


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
        if tensor.layout is not torch.strided:
            raise ValueError(f"{source}: {name} is {tensor.layout}; expected a dense tensor")
    return {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def check_index(directory: str) -> None:
    """Check the index of a sharded checkpoint against its files before anything is loaded.

    Raises:
        ValueError: the index is damaged, names a tensor twice, a file outside the directory or one that is not there, or a tensor
            that its file lacks.
    """
    found = next((p for n in INDEX_NAMES if os.path.isfile(p := os.path.join(directory, n))), None)
    if found is None or os.path.isfile(os.path.join(directory, "model.safetensors")):
        return
    try:
        with open(found, encoding="utf-8") as file:
            content = json.load(file, object_pairs_hook=_unique)
        shards = content["weight_map"]
        if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
            raise ValueError("weight_map does not map names of tensors to names of files")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{found} is no usable index: {error}") from None
    for name in dict.fromkeys(shards.values()):
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise ValueError(f"{found} names the file {name!r}; valid: files of the directory itself")
        if not os.path.isfile(os.path.join(directory, name)):
            raise ValueError(f"{found} names {name}, which is not there: the checkpoint is not complete")
    if found.endswith(INDEX_NAMES[0]):
        files = TensorFiles(os.path.join(directory, name) for name in dict.fromkeys(shards.values()))
        for tensor, name in shards.items():
            if os.path.basename(files._file.get(tensor, "")) != name:
                raise ValueError(f"{found} says that {tensor} is in {name}, which has no such tensor")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name!r} is there twice")
        result[name] = value
    return result
