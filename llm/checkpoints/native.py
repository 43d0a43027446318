"""llmrt's own checkpoint format, through transformers.

A directory as `save_pretrained` writes it: config.json with ``quantization_config: {"quant_method": "llmrt", ...}`` and safetensors
in which a quantized linear `name` has the canonical tensors ``name.qweight``, ``name.scales``, ``name.zeros`` (asymmetric only),
``name.perm`` (act-order only) and ``name.bias``; so has each linear of each expert (llm/experts.py). The packed weights of a CPU or
GPU are made at load. After ``import llmrt.llm`` (transformers has no plugin mechanism: without it the weights would be skipped with a
mere warning) ``AutoModelForCausalLM.from_pretrained`` reads it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from ..experts import is_experts
from ..linear import CanonicalLinear
from ..model_card import write_card
from ..moving import chosen_device, move
from ..optimize import optimize
from ..quantization import QUANT_METHOD, WeightOnlyQuantConfig
from ..quantized import restore_floats
from ..static.config import STATIC_METHOD
from .configuration import check_layers, explained, local_files, read_configuration, stored_quantization
from .contents import ModelNames, check_contents
from .entries import expect_finite
from .files import TensorFiles
from .stored import check_outside, linears_of, store_experts, untie

register_quantization_config(QUANT_METHOD)(WeightOnlyQuantConfig)


@register_quantizer(QUANT_METHOD)
class Quantizer(HfQuantizer):
    """What transformers calls while it loads a model with our quantization config."""

    requires_calibration = False
    quantization_config: WeightOnlyQuantConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a device that llmrt has no kernels for."""
        check_device_map(device_map)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if self.pre_quantized:
            prepare_native(model, self.quantization_config, checkpoint_files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_loaded(model)
        model.eval()
        return optimize(model, inplace=True, quantization_config=self.quantization_config)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # saving leaves a text in the configuration
        return restore_floats(model, dtype or model.dtype)

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Return nothing in place of the model's own tensors; write the model card.

        transformers calls this in the middle of `save_pretrained`, of which it says the directory to nobody: it is read from the
        caller's variables. (A method of the model in place of its class's would outlive a model that is nobody's.)
        """
        caller = inspect.currentframe()
        found = caller.f_back.f_locals if caller is not None and caller.f_back is not None else {}
        if found.get("save_directory") is not None and found.get("is_main_process", True):
            write_card(model, found["save_directory"])
        return super().get_state_dict_and_metadata(model)

    def is_serializable(self) -> bool:
        """Saving writes canonical tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Quantized weights have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Operators have fake kernels."""
        return True


def check_device_map(device_map: Any) -> None:
    """Raise ValueError if a device_map places anything elsewhere than on the CPU."""
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    wrong = [str(d) for d in devices if d is not None and str(d) not in ("cpu", "auto")]
    if wrong:
        raise ValueError(
            f"device_map has {', '.join(wrong)}; transformers loads a quantized checkpoint on the CPU (device_map='cpu'): "
            "llm.AutoModelForCausalLM.from_pretrained(path, device=...) moves it"
        )


def prepare_native(model: Any, config: WeightOnlyQuantConfig, paths: Sequence[str] | None) -> None:
    """Replace the quantized linears of a model on the meta device by empty `CanonicalLinear`s.

    Args:
        model: not yet loaded.
        config: of the checkpoint.
        paths: its files, whose headers are compared with the model; None: a state dict is loaded.

    Raises:
        ValueError: the configuration names linears that the model lacks, or a tensor is missing or of another shape or dtype.
    """
    names = ModelNames(model)
    head = model.get_output_embeddings()
    experts = [name for name, m in model.named_modules() if is_experts(m)]
    tensors = None if paths is None or not experts else len(TensorFiles(paths).entries)
    store_experts(model, [name for name in experts if config.excluded_by(name) is None], tensors)
    linears = linears_of(model)
    for field in ("floating_modules", "layouts", "permuted_modules", "biased_modules"):
        unknown = sorted(set(getattr(config, field) or ()) - {*linears, *experts})
        if unknown:
            raise ValueError(f"quantization_config.{field} names no linear of this model: {', '.join(unknown)}")
    for name, linear in linears.items():
        layout = config.layout_of(name, linear is head)
        if layout is None:
            continue
        added = linear.bias is None and name in (config.biased_modules or ())
        sizes, biased = (linear.in_features, linear.out_features), added or linear.bias is not None
        permuted = name in (config.permuted_modules or ())
        new = CanonicalLinear(*sizes, biased, layout, linear.weight.dtype, "meta", permuted)
        new.added_bias = added
        new._is_hf_initialized = True  # type: ignore[assignment]
        model.set_submodule(name, new)
    check_files(model, names, set(linears), paths)


def check_files(model: Any, names: ModelNames, linears: set[str], paths: Sequence[str] | None) -> None:
    """Compare the headers of llmrt's own checkpoint with a model whose quantized linears were replaced.

    Args:
        model: on the meta device.
        names: of the model before that.
        linears: of the model before that.
        paths: of the files; None: a state dict is loaded.

    Raises:
        ValueError: a tensor is missing, of another shape or dtype, or a quantized weight is no linear of the model.
    """
    untie(model)
    if paths is None:
        return
    files = TensorFiles(paths)
    quantized = [prefix for prefix, found in files.groups().items() if "qweight" in found]
    called = {p: {names.of(f"{p}.{key}")[0].rpartition(".")[0] for key in ("weight", "qweight")} for p in quantized}
    check_outside(
        [p for p in quantized if linears.isdisjoint(called[p])], model
    )  # a `weight` of experts would be joined
    check_contents(model, files, ModelNames(model))  # with the names of the quantized tensors


def check_loaded(model: nn.Module) -> None:
    """Raise ValueError if the checkpoint lacked a tensor (transformers would go on with what memory held), or has unusable values."""
    for name, module in model.named_modules():
        if not isinstance(module, CanonicalLinear):
            continue
        for part, tensor in (*module._buffers.items(), *module._parameters.items()):
            if tensor is not None and not getattr(tensor, "_is_hf_initialized", False):
                raise ValueError(f"the checkpoint has no {name}.{part}")
        for part in ("scales", "bias"):
            expect_finite(f"{name}.{part}", getattr(module, part))
        try:
            module.canonical()
        except RuntimeError as error:
            raise ValueError(f"{name}: {error}") from None


def save_quantized(model: Any, directory: str | os.PathLike[str]) -> None:
    """Save a quantized model; the same as its `save_pretrained`, which writes a model card too (README.md, see llm/model_card.py).

    Args:
        model: from `optimize` with a quantization_config.
        directory: made if it is not there.

    Raises:
        ValueError: the model is not quantized.
    """
    if not isinstance(getattr(model, "hf_quantizer", None), Quantizer):
        raise ValueError(
            "the model is not quantized by llmrt; call optimize with a quantization_config, or save_pretrained"
        )
    model.save_pretrained(directory)


def from_quantized(
    directory: str | os.PathLike[str], dtype: torch.dtype | str = "auto", device: str | torch.device | None = None
) -> Any:
    """Load a model that `save_quantized` or `save_pretrained` wrote: optimized, outputs bit-equal to the saved one's.

    Args:
        directory: with config.json and safetensors.
        dtype: of what is not quantized; "auto": as saved.
        device: what the model runs on, see `optimize`; None: the CPU.

    Raises:
        ValueError: the directory holds no llmrt checkpoint, or one whose tensors do not fit.
        RuntimeError: the device is absent.
    """
    target, _ = chosen_device(device, None)
    path = os.fspath(directory)
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise ValueError(f"{path} has no config.json")
    config, _ = read_configuration(path, {}, {})
    files = local_files(path, config, {})
    check_layers(path, config, files)
    method = (stored_quantization(config, path) or {}).get("quant_method")
    if method not in (QUANT_METHOD, STATIC_METHOD):
        raise ValueError(f"{path} is not an llmrt checkpoint (quant_method is {method!r}); load it and call optimize")
    with explained(path, config, []):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    move(model, target)
    return model
