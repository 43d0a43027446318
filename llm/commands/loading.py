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
    """Return the directory that `name` means, or None for a name on the hub; exit if it is a path to nothing."""
    if name == DEMO:
        return str(demo_model_path())
    if not name.strip():
        fail("MODEL is empty; give a directory or a name on the Hugging Face hub")
    if is_model_directory(name):
        return str(Path(name).expanduser())
    if os.path.isdir(os.path.expanduser(name)):
        fail(f"{name}: the directory has no config.json, so it holds no model")
    if os.path.exists(os.path.expanduser(name)):
        fail(f"{name}: is a file; give the directory that holds the model")
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
) -> Loaded:
    """Return the optimized model of a local directory or a name on the hub.

    Args:
        name: "demo", a directory (never looked up on the hub), or else a name on the Hugging Face hub.
        dtype: of everything that is not quantized; None: as the checkpoint says.
        quantization: quantize the weights; None: leave them as stored.
        kv_dtype: what the cache stores keys and values as; None: the model's dtype.
    """
    directory = _local_directory(name)
    start = time.perf_counter()
    import transformers

    from ..cache import choose_kv_dtype
    from ..optimize import optimize

    transformers.utils.logging.disable_progress_bar()
    source, local = directory or name, directory is not None
    with _short_errors(
        f"{name} cannot be loaded" if local else f"{name} is no directory here, and the Hugging Face hub failed"
    ):
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=local)
        if getattr(config, "quantization_config", None) is not None and quantization is not None:
            fail(f"{name} is quantized already; leave out --weight-dtype, or give the floating-point model")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype or "auto", local_files_only=local
        ).eval()
    with _short_errors(f"{name} cannot be optimized"):
        if getattr(model, "optimization_report", None) is None:  # a directory that llmrt wrote loads optimized
            model = optimize(
                model, dtype=model.dtype, inplace=True, quantization_config=quantization, kv_dtype=kv_dtype
            )
        else:
            choose_kv_dtype(model, kv_dtype)
    return Loaded(model, tokenizer, time.perf_counter() - start)
