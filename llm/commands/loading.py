"""Loads the model that a command names, with messages instead of tracebacks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..demo import demo_model_path
from .options import DEMO, fail

if TYPE_CHECKING:
    import torch

    from ..quantization import WeightOnlyQuantConfig


@dataclass(frozen=True)
class Loaded:
    """A model ready to run.

    Args:
        model: optimized, in evaluation mode.
        tokenizer: its tokenizer.
        seconds: what loading and optimizing took.
    """

    model: Any
    tokenizer: Any
    seconds: float

    @property
    def max_tokens(self) -> int | None:
        """Longest sequence that the model knows positions for; None if its configuration does not say."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def room(self, tokens: int, max_new_tokens: int) -> int:
        """Return how many tokens may follow a prompt of `tokens`, at most max_new_tokens; exit if there is no room."""
        limit = self.max_tokens
        if limit is None:
            return max_new_tokens
        if tokens >= limit:
            fail(f"the prompt has {tokens} tokens; this model takes at most {limit}, new ones included")
        return min(max_new_tokens, limit - tokens)


def is_model_directory(name: str) -> bool:
    """Return whether `name` is a directory with a model's configuration."""
    try:
        return (Path(name).expanduser() / "config.json").is_file()
    except (OSError, ValueError, RuntimeError):  # too long for a path, a null character, an unknown ~user
        return False


def _local_directory(name: str) -> str | None:
    """Return the directory (or GGUF file) that `name` means, or None for a name on the hub; exit if it is a path to nothing."""
    if name == DEMO:
        return str(demo_model_path())
    if not name.strip():
        fail("MODEL is empty; give a directory or a name on the Hugging Face hub")
    if is_model_directory(name):
        return str(Path(name).expanduser())
    if os.path.isdir(os.path.expanduser(name)):
        fail(f"{name}: the directory has no config.json, so it holds no model")
    if name.endswith(".gguf") and os.path.isfile(os.path.expanduser(name)):
        return os.path.expanduser(name)
    if os.path.exists(os.path.expanduser(name)):
        fail(f"{name}: is a file; give the directory that holds the model, or a .gguf file")
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith("/"):
        fail(f"{name}: no such directory")
    return None


@contextmanager
def _short_errors(prefix: str) -> Iterator[None]:
    """Turn what transformers or `optimize` raise for a model that cannot be used into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except typer.Exit:  # a RuntimeError too
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        fail(f"{prefix}: {first}")


def load(
    name: str,
    dtype: torch.dtype | None = None,
    quantization: WeightOnlyQuantConfig | None = None,
    kv_dtype: str | None = None,
    compute_dtype: str | None = None,
    quantized_only: bool = False,
    device: str = "cpu",
) -> Loaded:
    """Return the optimized model of a local directory, a GGUF file or a name on the hub.

    Args:
        name: "demo", a directory or file (never looked up on the hub), or else a name on the Hugging Face hub.
        dtype: of everything that is not quantized; None: as the checkpoint says.
        quantization: quantize the weights; None: leave them as stored.
        kv_dtype: what the cache stores keys and values as; None: the model's dtype.
        compute_dtype: of the products of weights that are stored quantized; None: "auto".
        quantized_only: exit if the weights are stored floating point.
        device: what the model runs on; exit if it is absent.
    """
    directory = _local_directory(name)
    start = time.perf_counter()
    import transformers

    from ... import devices
    from ..checkpoints import AutoModelForCausalLM
    from ..checkpoints.configuration import stored_quantization

    try:
        devices.check(device)
    except (ValueError, RuntimeError) as error:
        fail(f"--device: {error}")
    transformers.utils.logging.disable_progress_bar()
    source, local = directory or name, directory is not None
    options: dict[str, Any] = {"local_files_only": local}
    with _short_errors(
        f"{name} cannot be loaded" if local else f"{name} is no directory here, and the Hugging Face hub failed"
    ):
        is_file = os.path.isfile(source)
        config = None if is_file else transformers.AutoConfig.from_pretrained(source, **options)
        stored = None if config is None else stored_quantization(config, source)
        if (stored is not None or is_file) and quantization is not None:
            fail(f"{name} is quantized already; leave out --weight-dtype, or give the floating-point model")
        if stored is None and not is_file and quantized_only:
            fail(f"{name} is not quantized; llmrt quantize makes a quantized copy of it")
        folder, file = os.path.split(source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            *((folder or ".",) if is_file else (source,)), **options, **({"gguf_file": file} if is_file else {})
        )
        model = AutoModelForCausalLM.from_pretrained(
            source,
            quantization_config=quantization,
            dtype=dtype,
            device=device,
            compute_dtype=compute_dtype,
            kv_dtype=kv_dtype,
            **({} if is_file else options),
        )
    return Loaded(model, tokenizer, time.perf_counter() - start)
