"""`AutoModelForCausalLM`: a model of any checkpoint, optimized, quantized as stored or while it loads."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers

from ..cache import choose_kv_dtype
from ..linear import CanonicalLinear
from ..moving import chosen_device, move
from ..optimize import optimize
from ..quantization import QUANT_METHOD, WeightOnlyQuantConfig
from ..quantized import stored_config
from ..static.config import STATIC_METHOD, StaticQuantConfig
from . import gguf
from .configuration import check_layers, check_model, explained, local_files, read_configuration, stored_quantization
from .importing import IMPORT_METHOD
from .readers import find_reader

#: Arguments of the hub, which configuration and weights are looked up with.
_HUB = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token", "trust_remote_code",
    "code_revision",
)  # fmt: skip
#: `load_in_low_bit` -> fields of a `WeightOnlyQuantConfig`; any of its weight dtypes works too. None: not quantized.
_LOW_BITS: dict[str, dict[str, Any] | None] = {
    "sym_int4": {"weight_dtype": "int4"},
    "asym_int4": {"weight_dtype": "int4", "scheme": "asym"},
    "woq_int4": {"weight_dtype": "int4"},
    "sym_int8": {"weight_dtype": "int8"},
    "asym_int8": {"weight_dtype": "int8", "scheme": "asym"},
    "q4_0": {"weight_dtype": "int4", "use_ggml": True},
    "q8_0": {"weight_dtype": "int8", "use_ggml": True},
    "bf16": None,
    "fp16": None,
}
_LOW_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: Arguments of the predecessors that choose what is always so here: name -> the values that it may have.
_SETTLED: dict[str, tuple[Any, ...]] = {
    "optimize_model": (True,),
    "use_neural_speed": (True, False, None),
    "use_llm_runtime": (True, False, None),
    "use_cpu": (True,),
    "cpu_embedding": (True, False),
    "mixed_precision": (True, False),
    "low_memory_init": (True, False),
    "weights_only": (True,),
}


class AutoModelForCausalLM:
    """Loads models. As transformers' class of this name, and it reads foreign quantized checkpoints without their packages."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        quantization_config: WeightOnlyQuantConfig | Mapping[str, Any] | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        load_in_low_bit: str | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        device: str | torch.device | None = None,
        modules_to_not_convert: list[str] | None = None,
        compute_dtype: str | None = None,
        kv_dtype: str | torch.dtype | None = None,
        deployment_mode: bool = True,
        strict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the optimized model of a directory, a name on the hub or a GGUF file.

        A checkpoint that is quantized (its config.json says how) stays quantized: GPTQ, AWQ and the others are read tensor by tensor
        into packed weights, exactly, and what they keep floating point stays so. A floating-point checkpoint is quantized while
        it loads if asked for. Either way the memory needed is about that of the result and one weight.

        Args:
            path: with config.json and safetensors (or torch files, which are read with weights_only=True), or a ``.gguf`` file.
            quantization_config: how to quantize a floating-point checkpoint; also as a dict of its fields.
            load_in_4bit, load_in_8bit: the predecessors' way to say INT4 or INT8; with `quantization_config` they set its weights.
            load_in_low_bit: a weight dtype ("nf4", "int8", "fp8_e4m3" ...), or sym_int4, asym_int4, sym_int8, q4_0, q8_0; bf16 and
                fp16 mean that dtype, not quantized.
            dtype: of everything that is not quantized; None or "auto": as the checkpoint says.
            device: what the model runs on, see `optimize`; a `device_map` that names one device says the same. Weights are read and packed
                on the CPU and then moved one by one, so that the CPU's memory holds the packed model and one weight. Whether the
                device is there is checked before anything is read.
            modules_to_not_convert: linears that stay floating point, see `WeightOnlyQuantConfig`.
            compute_dtype: arithmetic of the quantized products; None: "auto".
            kv_dtype, deployment_mode, strict: see `optimize`.
            kwargs: of transformers' from_pretrained, `torch_dtype` too.

        Raises:
            ValueError: an argument is unusable; the checkpoint is quantized in a way that cannot be read, or damaged, or is to be
                quantized again. Shapes, dtypes and names are checked before memory is taken.
            RuntimeError: the device is absent.
            OptimizationError: see `optimize`.
        """
        _settle(kwargs)
        given = kwargs.pop("torch_dtype", None)
        floats: Any = _dtype(given if dtype is None else dtype, load_in_low_bit)
        wanted = _wanted(quantization_config, load_in_4bit, load_in_8bit, load_in_low_bit, modules_to_not_convert)
        if wanted is not None and compute_dtype is not None:
            wanted = replace(wanted, compute_dtype=compute_dtype)
        path = os.fspath(path)
        target, device_map = chosen_device(device, kwargs.pop("device_map", None))
        if device_map is not None:
            kwargs["device_map"] = device_map
        if path.endswith(".gguf"):
            unknown = sorted(set(kwargs) - {"device_map", *_HUB})
            if unknown:
                raise ValueError(f"{path} is a GGUF file, for which {', '.join(unknown)} has no meaning; leave it out")
            options = {"kv_dtype": kv_dtype, "deployment_mode": deployment_mode, "device": target}
            return gguf.load(path, floats, wanted, compute_dtype or "auto", strict, **options)
        hub = {key: kwargs.pop(key) for key in _HUB if key in kwargs}
        config, kwargs = read_configuration(path, hub, kwargs)
        files = local_files(path, config, {**hub, **kwargs})
        check_layers(path, config, files)
        stored = stored_quantization(config, path)
        if stored is not None:
            _refuse_twice(path, stored, wanted)
            _take_over(config, stored)
        elif files:
            check_model(path, config, files, bool(hub.get("trust_remote_code")))
        load_dtype = "auto" if wanted is not None else floats
        model = _load(path, config, load_dtype, files if stored is None else [], {**hub, **kwargs})
        method = (stored or {}).get("quant_method")
        if getattr(model, "optimization_report", None) is not None:  # one of llmrt's formats that optimizes itself
            move(model, target)
            choose_kv_dtype(model, kv_dtype)
            return model
        if method == QUANT_METHOD:
            wanted = _native(stored or {}, compute_dtype)
        elif any(isinstance(m, CanonicalLinear) for m in model.modules()):
            wanted = stored_config(model, compute_dtype or "auto", str(method))
        return optimize(
            model.eval().requires_grad_(False),
            dtype=model.dtype if floats == "auto" else floats,
            inplace=True,
            device=target,
            quantization_config=wanted,
            deployment_mode=deployment_mode,
            strict=strict,
            kv_dtype=kv_dtype,
        )


def _settle(kwargs: dict[str, Any]) -> None:
    """Take out arguments that change nothing, and refuse values that cannot be had."""
    for name, valid in _SETTLED.items():
        if name in kwargs and kwargs.pop(name) not in valid:
            raise ValueError(f"{name}: valid: {', '.join(map(repr, valid))}")
    if kwargs.pop("output_loading_info", False):
        raise ValueError("output_loading_info: the model is returned alone; print its optimization_report")


def _dtype(dtype: Any, load_in_low_bit: Any) -> Any:
    """Return the dtype of floating-point parts, or "auto"."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    found = "auto" if found is None and dtype is None else found
    if found != "auto" and found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype!r}; valid: torch.float32, torch.bfloat16, torch.float16, 'auto' or None")
    return _LOW_DTYPES.get(load_in_low_bit, found) if found == "auto" else found


def _wanted(
    config: Any, load_in_4bit: bool, load_in_8bit: bool, load_in_low_bit: str | None, skipped: list[str] | None
) -> WeightOnlyQuantConfig | None:
    """Return the quantization that the arguments ask for."""
    fields: dict[str, Any] = {}
    asked = [n for n, v in (("load_in_4bit", load_in_4bit), ("load_in_8bit", load_in_8bit)) if v]
    if load_in_low_bit is not None:
        asked.append("load_in_low_bit")
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} are given; pass one")
    if load_in_low_bit in _LOW_BITS:
        low = _LOW_BITS[load_in_low_bit]
        if low is None:
            asked = []
        fields.update(low or {})
    elif load_in_low_bit is not None:
        fields["weight_dtype"] = load_in_low_bit
    if load_in_4bit or load_in_8bit:
        fields["load_in_4bit" if load_in_4bit else "load_in_8bit"] = True
    if isinstance(config, WeightOnlyQuantConfig):
        unsaved = {"calibration": config.calibration, "tokenizer": config.tokenizer}
        config = {**config.to_dict(), **unsaved}
    if config is not None and not isinstance(config, Mapping):
        raise ValueError(
            f"quantization_config is a {type(config).__name__}; valid: llm.WeightOnlyQuantConfig, a dict of its fields, or None"
        )
    if config is None and not asked:
        return None
    if skipped is not None:
        fields["modules_to_not_convert"] = skipped
    return _checked({**(config or {}), **fields}, load_in_low_bit)


def _native(stored: Mapping[str, Any], compute_dtype: str | None = None) -> WeightOnlyQuantConfig:
    """Return the configuration of one of llmrt's own checkpoints."""
    return _checked({**stored, **({} if compute_dtype is None else {"compute_dtype": compute_dtype})}, None)


def _checked(fields: dict[str, Any], load_in_low_bit: str | None) -> WeightOnlyQuantConfig:
    try:
        return WeightOnlyQuantConfig.from_dict(fields)
    except ValueError as error:
        if load_in_low_bit is None or load_in_low_bit in _LOW_BITS:
            raise
        raise ValueError(
            f"load_in_low_bit is {load_in_low_bit!r}; valid: {', '.join(_LOW_BITS)}, or: {error}"
        ) from None


def _refuse_twice(path: str, stored: Mapping[str, Any], wanted: Any) -> None:
    if wanted is not None:
        raise ValueError(
            f"{path} is quantized already (quant_method {stored.get('quant_method')!r}); leave out quantization_config and load_in_*, "
            "or give the floating-point model. compute_dtype chooses the arithmetic"
        )


def _take_over(config: Any, stored: dict[str, Any]) -> None:
    """Let transformers load a quantized checkpoint through our quantizers.

    Raises:
        ValueError: no reader knows the format.
    """
    method = stored.get("quant_method")
    if method == STATIC_METHOD:
        StaticQuantConfig.from_dict(stored)
        return
    if method == QUANT_METHOD:
        _native(stored)
    else:
        find_reader(stored)
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    config.quantization_config = {"quant_method": IMPORT_METHOD, "stored": stored}


def _load(path: str, config: Any, dtype: Any, files: list[str], options: dict[str, Any]) -> Any:
    """Return transformers' model; ValueError for a file that cannot be read and for weights that are missing."""
    try:
        with explained(path, config, files, bool(options.get("trust_remote_code"))):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=dtype, output_loading_info=True, **options
            )
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: a torch file holds more than tensors: {str(error).splitlines()[0]}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more tensors of the model" if len(missing) > 1 else ""
        raise ValueError(f"the checkpoint {path} has no {missing[0]}{more}")
    return model
