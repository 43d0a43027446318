"""The compile backend ``torch.compile(model, backend="llmrt")``, found by name through the package's entry point."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

#: The modes that ``torch.compile`` documents. transformers' CompileConfig passes "reduce-overhead" to any backend.
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

#: Names that ``options=`` may hold.
OPTIONS: tuple[str, ...] = ()


def llmrt_backend(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Return the callable that runs a captured graph; the graph is run as it was captured.

    Args:
        gm: graph that dynamo captured.
        example_inputs: its inputs, fake or real.
        mode: as given to ``torch.compile``; every mode gives the same graph.
        options: as given to ``torch.compile``.

    Raises:
        ValueError: an unknown mode or option.
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode={mode!r}: the llmrt backend knows {', '.join(MODES)}")
    if unknown := sorted(set(options or ()) - set(OPTIONS)):
        known = ", ".join(OPTIONS) or "none"
        raise ValueError(f"options={unknown}: unknown to the llmrt backend (known options: {known})")
    return gm.forward
