"""Quantized linears as a foreign checkpoint stores them: checked by their headers, read one by one when the rest is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.formats import check_canonical
from ..expert_plan import unlike_experts
from ..experts import StoredExperts, is_experts, sizes_of
from ..linear import CanonicalLinear, check_perm
from ..memory import return_free_memory
from ..plan import is_linear
from ..probe import probe_activation, usual_tensors
from .contents import ModelNames, check_contents
from .files import TensorFiles
from .reader import Reader, Weight

#: Freed memory is handed back to the system when it has become that much.
KEPT_BYTES = 8 << 20


class StoredLinear(nn.Module):
    """Stands for a quantized linear while transformers loads the other tensors; holds none itself.

    Args:
        linear: that it replaces.
        prefix: of its tensors' names in the files.
        suffixes: what these names end with.
    """

    def __init__(self, linear: nn.Linear, prefix: str, suffixes: list[str]) -> None:
        """Note the sizes."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.biased = linear.weight.dtype, linear.bias is not None
        self.prefix, self.suffixes = prefix, suffixes
        self._is_hf_initialized = True

    @property
    def weight(self) -> Tensor:
        """A meta tensor [N, K]: transformers may initialize a linear's weight while it loads, which then does nothing."""
        return torch.empty((self.out_features, self.in_features), device="meta")


def canonical_linear(
    name: str, weight: Weight, in_features: int, out_features: int, dtype: torch.dtype, bias: Tensor | None, own: bool
) -> CanonicalLinear:
    """Return a linear that holds a reader's result.

    Args:
        name: for messages.
        weight: of a reader.
        in_features: K.
        out_features: N.
        dtype: of the bias.
        bias: [N], used where the weight has none.
        own: whether the model's class gives the linear a bias; a bias of zeros is dropped where it does not.

    Raises:
        ValueError: the tensors do not fit each other or the sizes, or the bias is missing.
    """
    bias = weight.bias if weight.bias is not None else bias
    if own and bias is None:
        raise ValueError(f"the checkpoint has no {name}.bias")
    if bias is not None and (tuple(bias.shape) != (out_features,) or not bias.is_floating_point()):
        raise ValueError(f"{name}.bias is {bias.dtype} {list(bias.shape)}; expected floating [{out_features}]")
    if bias is not None and not own and not bool(bias.any()):
        bias = None
    part, layout = weight.canonical, weight.layout
    try:
        check_canonical(*part, layout, in_features)
        check_perm(weight.perm, in_features)
        if part.qweight.shape[0] != out_features:
            raise RuntimeError(f"codes has {part.qweight.shape[0]} rows; expected {out_features}")
    except RuntimeError as error:
        raise ValueError(f"{name}: {error}") from None
    result = CanonicalLinear(in_features, out_features, False, layout, dtype, "meta")
    for key, tensor in (*part._asdict().items(), ("perm", weight.perm)):
        result._buffers[key] = None if tensor is None else _alone(tensor)
    if bias is not None:
        result.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
        result.added_bias = not own
    return result.eval()


def _alone(tensor: Tensor) -> Tensor:
    """Return a tensor that keeps no larger memory alive."""
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def linears_of(model: Any) -> dict[str, nn.Linear]:
    """Return the linears of a model by name; ValueError if one has no inputs or no outputs."""
    found = {name: m for name, m in model.named_modules() if is_linear(m)}
    for name, linear in found.items():
        if min(linear.in_features, linear.out_features) < 1:
            raise ValueError(
                f"{name} has {linear.in_features} inputs and {linear.out_features} outputs, sizes of config.json; valid: at least 1"
            )
    return found


def prepare(model: Any, reader: Reader, files: TensorFiles) -> None:
    """Replace the quantized linears of a model on the meta device, after every tensor was checked against the model's sizes.

    Raises:
        ValueError: a tensor is missing, or has another shape or dtype; or a quantized weight is no linear of the model.
    """
    names = ModelNames(model)
    groups = {prefix: found for prefix, found in files.groups().items() if prefix and reader.quantizes(prefix, found)}
    inside = {prefix: part for prefix in groups if (part := names.expert_of(prefix)) is not None}
    experts = store_experts(model, [owner for owner, _ in inside.values()], len(files.entries))
    linears = linears_of(model)
    outside, found_for = [], dict[str, str]()
    for prefix, found in groups.items():
        name = names.of(f"{prefix}.weight")[0].rpartition(".")[0]
        if inside.get(prefix, ("",))[0] in experts:
            name = ".".join(inside[prefix])
        if name not in linears:
            outside.append(prefix)
            continue
        if name in found_for:
            raise ValueError(f"{found_for[name]} and {prefix} are both the weight of {name}")
        found_for[name] = prefix
        linear = linears[name]
        reader.check(prefix, linear.in_features, linear.out_features, found)
        if linear.bias is not None and "bias" not in found:
            raise ValueError(f"the checkpoint has no {prefix}.bias")
        model.set_submodule(name, StoredLinear(linear, prefix, list(found)))
    check_outside(outside, model)
    for owner in experts:
        check_complete(model, owner)
    if not found_for:
        raise ValueError("quantization_config says that the checkpoint is quantized, but no linear in its files is")
    untie(model)
    check_contents(model, files, names)
    ignore_stored(model, names)


def store_experts(model: Any, owners: Iterable[str], tensors: int | None = None) -> list[str]:
    """Replace experts of a model by `StoredExperts` and return the names of those that were replaced.

    Args:
        model: changed.
        owners: full names; those that are no experts are passed over.
        tensors: how many the checkpoint has; None: the model's experts are in memory.

    Raises:
        ValueError: experts have a form that cannot be computed quantized, or are more than the checkpoint has tensors.
    """
    replaced, probed = [], dict[Any, str | None]()
    modules = dict(model.named_modules())
    for name in dict.fromkeys(owners):
        module = modules.get(name)
        if module is None or not is_experts(module):
            continue
        if tensors is not None and sizes_of(module).experts > tensors:
            raise ValueError(
                f"config.json asks for {sizes_of(module).experts} experts in {name}; the checkpoint has {tensors} tensors"
            )
        with usual_tensors():
            activation = probe_activation(getattr(module, "act_fn", None))
            key = type(module), activation, sizes_of(module)
            if key not in probed:
                probed[key] = unlike_experts(module, activation)
            misfit = probed[key]
        if misfit is not None or activation is None:
            raise ValueError(f"{name} is quantized in the checkpoint, and cannot be computed so: {misfit}")
        model.set_submodule(name, StoredExperts(module, activation))
        replaced.append(name)
    return replaced


def check_complete(model: Any, owner: str) -> None:
    """Raise ValueError unless all linears of these `StoredExperts` were replaced by quantized ones."""
    for name, module in model.get_submodule(owner).named_modules():
        if isinstance(module, nn.Linear):
            raise ValueError(f"the checkpoint has other experts quantized, and nothing for {owner}.{name}")


def check_outside(outside: list[str], model: Any) -> None:
    """Raise ValueError if there are quantized weights that no linear of the model takes."""
    if not outside:
        return
    more = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
    raise ValueError(f"{outside[0]}{more} are quantized in the checkpoint and no linear of {type(model).__name__}")


def untie(model: Any) -> None:
    """A head that is stored quantized is not the embedding's table, whatever the configuration says."""
    head = model.get_output_embeddings()
    if not isinstance(head, StoredLinear | CanonicalLinear):
        return
    name = next(n for n, m in model.named_modules() if m is head)
    for part in (model.config, model.config.get_text_config(decoder=True)):
        part.tie_word_embeddings = False
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    model.all_tied_weights_keys = {t: s for t, s in tied.items() if f"{name}.weight" not in (t, s)}


def ignore_stored(model: Any, names: ModelNames) -> None:
    """Keep transformers from reporting the tensors of `StoredLinear`s as unexpected."""
    keys = (f"{m.prefix}.{suffix}" for m in model.modules() if isinstance(m, StoredLinear) for suffix in m.suffixes)
    kinds = {re.sub(r"\d+", "0", key): key for key in keys}  # those of different layers and experts are renamed alike
    patterns = (re.sub(r"\d+", r"\\d+", re.escape(names.of(key)[0])) for key in kinds.values())
    known = model._keys_to_ignore_on_load_unexpected or set()
    model._keys_to_ignore_on_load_unexpected = set(known) | {f"^(.*\\.)?{pattern}$" for pattern in patterns}


def read_all(model: Any, reader: Reader, files: TensorFiles) -> None:
    """Turn every `StoredLinear` into a `CanonicalLinear`, one after the other: a foreign tensor lives as long as its linear is read.

    Raises:
        ValueError: of the reader.
    """
    freed = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, StoredLinear):
            continue
        k, n = module.in_features, module.out_features
        tensors = {suffix: files.read(f"{module.prefix}.{suffix}") for suffix in module.suffixes}
        bias = tensors.get("bias")
        freed += sum(tensor.nbytes for tensor in tensors.values())
        weight = reader.read(module.prefix, k, n, tensors)
        del tensors
        model.set_submodule(name, canonical_linear(module.prefix, weight, k, n, module.dtype, bias, module.biased))
        del weight
        if freed > KEPT_BYTES:  # experts are many and small
            return_free_memory()
            freed = 0
    return_free_memory()
