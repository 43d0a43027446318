"""Compares what a checkpoint's files hold with what a model needs, by headers alone: before memory is taken."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..experts import PARTS
from ..linear import CanonicalLinear
from .files import TensorFiles

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


#: Values that a byte of a file can stand for (weights of 2 bits), and values that a model may have besides.
_VALUES_PER_BYTE, _MORE_VALUES = 4, 1 << 26


class ModelNames:
    """The names of a checkpoint's tensors in the model, as transformers will rename them.

    Args:
        model: not yet loaded; its linears may be replaced later.
    """

    def __init__(self, model: Any) -> None:
        """Ask transformers for its rules."""
        rules = get_model_conversion_mapping(model)
        self._renamings = [r for r in rules if isinstance(r, WeightRenaming)]
        self._converters = [r for r in rules if isinstance(r, WeightConverter)]
        self._base = model.base_model_prefix
        self._known = model.state_dict()
        self._found: dict[str, tuple[str, bool]] = {}

    def of(self, key: str) -> tuple[str, bool]:
        """Return a tensor's name in the model and whether transformers computes another tensor from it."""
        if key not in self._found:
            self._found[key] = self._renamed(key)
        return self._found[key]

    def _renamed(self, key: str) -> tuple[str, bool]:
        name, converter = rename_source_key(key, self._renamings, self._converters, self._base, self._known)
        if name not in self._known and key in self._known:
            return key, False
        return name, converter is not None

    def expert_of(self, prefix: str) -> tuple[str, str] | None:
        """Return the experts' module that a linear of one expert belongs to and the linear's name in it ("3.gate_proj"), or None.

        transformers joins these linears: its rules say which of them (in one checkpoint w1, w3 and w2) are gate, up and down.

        Args:
            prefix: the linear's name in the checkpoint.
        """
        key = f"{prefix}.weight"
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._base, self._known)
        number = re.search(r"\.(\d+)\.[^.]+$", prefix)
        if number is None:
            return None
        if pattern is None:  # a checkpoint that names them as we do
            found = re.fullmatch(rf"(.+)\.(\d+\.(?:{'|'.join(PARTS)}))", name.removesuffix(".weight"))
            return None if found is None else (found[1], found[2])
        sources = next(c.source_patterns for c in self._converters if pattern in c.source_patterns)
        owner, _, joined = name.rpartition(".")
        parts = {"gate_up_proj": PARTS[:2], "down_proj": PARTS[2:]}.get(joined, ())
        return (owner, f"{number[1]}.{parts[sources.index(pattern)]}") if len(parts) == len(sources) else None


def check_values(model: torch.nn.Module, size: int) -> None:
    """Raise ValueError if a model has far more values than a checkpoint of so many bytes can hold.

    Args:
        model: on the meta device.
        size: bytes of the weights.
    """
    most = _VALUES_PER_BYTE * size + _MORE_VALUES
    for kind, tensors in (("parameters", model.parameters()), ("buffers", model.buffers())):
        count = sum(t.numel() for t in tensors)
        if count > most:
            raise ValueError(
                f"config.json asks for {count} values of {kind}; the checkpoint's weights have {size} bytes: it is damaged"
            )


def check_contents(model: Any, files: TensorFiles, names: ModelNames) -> None:
    """Raise ValueError unless the files have every tensor that the model loads from them, with its shape and kind.

    Args:
        model: on the meta device; linears that are read in another way are replaced by modules without tensors.
        files: of the checkpoint.
        names: of the model; before its linears were replaced, where they are read in another way.
    """
    check_values(model, files.nbytes)
    wanted = model.state_dict()
    found: dict[str, str] = {}
    exact = {f"{n}.{b}" for n, m in model.named_modules() if isinstance(m, CanonicalLinear) for b in m._buffers}
    for key, entry in files.entries.items():
        renamed, computed = names.of(key)
        for name in dict.fromkeys((key, renamed)):
            if name not in wanted:
                continue
            if name == renamed and not computed and name in found:
                raise ValueError(f"{found[name]} and {key} are both the model's {name}")
            found[name] = key
            tensor = wanted[name]
            if computed:
                continue
            if tuple(tensor.shape) != entry.shape:
                raise ValueError(
                    f"{key} has shape {list(entry.shape)}; expected {list(tensor.shape)}, a size of the model"
                )
            alike = name not in exact and tensor.dtype in _FLOATING and entry.dtype in _FLOATING
            if entry.dtype != tensor.dtype and not alike:
                raise ValueError(f"{key} has dtype {_short(entry.dtype)}; expected {_short(tensor.dtype)}")
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    known = set(found)
    known |= {target for target, source in tied.items() if source in known}
    known |= {source for target, source in tied.items() if target in known}
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    missing = [n for n in wanted if n not in known and not any(p.search(n) for p in ignored)]
    if missing:
        more = f" and {len(missing) - 1} more tensors of the model" if len(missing) > 1 else ""
        raise ValueError(f"the checkpoint has no {missing[0]}{more}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
