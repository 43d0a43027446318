"""What a checkpoint says of itself: the configuration of its model and of its quantization, checked before a model is made of it."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig

from .contents import ModelNames, check_contents, check_values
from .files import TensorFiles, is_archive, read_json, weight_files

#: More layers than any model has: files are asked for their tensors before so many are made.
_MANY_LAYERS = 256


def read_configuration(path: str, hub: Mapping[str, Any], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a model's configuration, changed by the arguments that it knows, and the other arguments.

    Raises:
        ValueError: config.json has a value that no model has.
        OSError: there is no config.json, or it is no JSON.
    """
    given = kwargs.pop("config", None)
    if isinstance(given, transformers.PreTrainedConfig):
        return given, kwargs
    try:
        config, rest = AutoConfig.from_pretrained(given or path, return_unused_kwargs=True, **hub, **kwargs)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # whatever strange values make transformers raise
        raise ValueError(f"{path}: its config.json cannot be used: {_short(error)}") from None
    return config, {key: value for key, value in rest.items() if key not in hub}


def stored_quantization(config: Any, path: str) -> dict[str, Any] | None:
    """Return what a checkpoint says of its quantization, or None if it is floating point."""
    for part in (config, config.get_text_config(decoder=True)):
        found = getattr(part, "quantization_config", None)
        if found is None:
            continue
        if not isinstance(found, Mapping) and not hasattr(found, "to_dict"):
            raise ValueError(f"{path}: quantization_config is {found!r:.200}; expected an object")
        return dict(found if isinstance(found, Mapping) else found.to_dict())
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):  # beside an old config.json
        file = os.path.join(path, name)
        if os.path.isfile(file):
            return {"quant_method": method, **read_json(file)}
    return None


def local_files(path: str, config: Any, options: Mapping[str, Any]) -> list[str]:
    """Return the weight files of a local directory, their index checked; none for a name on the hub.

    Args:
        path: of the directory.
        config: of the model.
        options: of transformers' from_pretrained.
    """
    if not os.path.isdir(path) or options.get("gguf_file") is not None:
        return []
    named = getattr(config, "transformers_weights", None)
    directory = os.path.join(path, options.get("subfolder") or "")
    files = weight_files(directory, named, options.get("variant"), options.get("use_safetensors"))
    for file in files:
        if not file.endswith(".safetensors"):
            is_archive(file)
    return files


def check_layers(path: str, config: Any, files: list[str]) -> None:
    """Raise ValueError for a number of layers that no model has, or that the files have no tensors for."""
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if layers is None:
        return
    if type(layers) is not int or layers < 1:
        raise ValueError(f"{path}: num_hidden_layers is {layers!r:.100}; valid: at least 1")
    if layers <= _MANY_LAYERS:
        return
    count = 0
    for file in files:
        if not file.endswith(".safetensors"):
            return
        with safe_open(file, framework="pt") as opened:
            count += len(opened.keys())
    if files and layers > count:
        raise ValueError(f"{path}: num_hidden_layers is {layers}, but the files have {count} tensors")


def check_model(path: str, config: Any, files: list[str], trust_remote_code: bool = False) -> Any:
    """Return a model without memory; ValueError if it cannot be made, or has far more values than the files.

    None for code of the checkpoint's own that the user trusts: it is run once only, by transformers.
    """
    if trust_remote_code and getattr(config, "auto_map", None):
        return None
    try:
        config = copy.deepcopy(config)
        for part in (config, config.get_text_config(decoder=True)):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError):
        raise
    except Exception as error:  # sizes that do not go together
        raise ValueError(f"{path}: no model can be made of its config.json: {_short(error)}") from None
    if files:
        check_values(model, sum(map(os.path.getsize, files)))
    return model


@contextmanager
def explained(path: str, config: Any, files: list[str], trust_remote_code: bool = False) -> Iterator[None]:
    """Turn whatever loading raises into a ValueError if config.json is to blame, or the files: those of a floating-point model."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception:
        model = check_model(path, config, [], trust_remote_code)
        if model is not None and files and all(file.endswith(".safetensors") for file in files):
            check_contents(model, TensorFiles(files), ModelNames(model))
        raise


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text[:300]}"
