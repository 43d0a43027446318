"""``llmrt perplexity``: how well a model, quantized or not, predicts texts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .loading import load

if TYPE_CHECKING:
    from ..perplexity import Perplexity


def perplexity(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=o.MODEL_HELP)] = o.DEMO,
    text: Annotated[list[Path] | None, typer.Option("--text", metavar="FILES", help="UTF-8 text files.")] = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="", hidden=True)] = None,
    demo_held_out: Annotated[
        bool, typer.Option("--demo-held-out", help="The standard library files that the demo model was not trained on.")
    ] = False,
    length: Annotated[int, typer.Option("--window", min=2, help="Tokens per window.")] = 512,
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, help="At most so many windows; default: all, held-out: 120.")
    ] = None,
    weight_dtype: o.WeightDTypeOption = o.WeightDType.NONE,
    group_size: o.GroupSizeOption = 128,
    scheme: o.SchemeOption = o.Scheme.SYM,
    compute_dtype: o.ComputeDTypeOption = o.ComputeDType.AUTO,
    dtype: o.DTypeOption = o.DType.AUTO,
    kv_dtype: o.KVDTypeOption = o.KVDType.AUTO,
    device: o.DeviceOption = "cpu",
    threads: o.ThreadsOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Print the perplexity of MODEL on texts, cut into windows that are predicted one by one from their first token.

    The texts are joined, each between the tokenizer's begin and end tokens; the rest that does not fill a window is dropped. With
    --kv-dtype keys and values go through a cache of that dtype.

    Example: llmrt perplexity demo --demo-held-out --weight-dtype int4 --group-size 32

    Example: llmrt perplexity ./Llama-3.2-1B --text wiki.txt --windows 40 --json
    """
    files = _files([*(text or ()), *(more or ())], demo_held_out)
    config = o.quantization(weight_dtype, group_size, scheme, compute_dtype)
    o.set_threads(threads)
    limit = 120 if windows is None and demo_held_out else windows
    result, weights = _measure(model, files, length, limit, dtype, config, kv_dtype, device)
    if as_json:
        typer.echo(json.dumps({"model": model, "weights": weights, **asdict(result)}, indent=2))
        return
    typer.echo(
        f"perplexity {result.value:.4f}  ({weights}; {result.windows} windows of {result.window_length} tokens, "
        f"{result.predicted_tokens / result.seconds:.0f} tok/s)"
    )


def _files(named: list[Path], demo_held_out: bool) -> list[Path]:
    """Return the files to read; exit if there are none, or one cannot be read."""
    if bool(named) == demo_held_out:
        o.fail("give either --text FILES or --demo-held-out")
    if demo_held_out:
        from ..demo import held_out_files

        return held_out_files()
    for file in named:
        if not file.is_file():
            o.fail(f"{file}: no such file")
    return named


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="ignore")
    except OSError as error:
        o.fail(f"{file}: {error.strerror or error}")


def _measure(
    model: str,
    files: list[Path],
    length: int,
    limit: int | None,
    dtype: o.DType,
    config: Any,
    kv_dtype: o.KVDType,
    device: str,
) -> tuple[Perplexity, str]:
    """Return the perplexity, and a text that says what the weights are."""
    from rich.console import Console
    from rich.progress import Progress

    from ..perplexity import perplexity as run
    from ..perplexity import token_windows

    loaded = load(model, dtype.torch(), config, kv_dtype.name_or_none(), device=device)
    if loaded.max_tokens is not None and length > loaded.max_tokens:
        o.fail(f"--window is {length}; this model takes at most {loaded.max_tokens} tokens")
    try:
        windows = token_windows(loaded.tokenizer, (_read(file) for file in files), length, limit)
    except ValueError as error:
        o.fail(str(error))
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("perplexity", total=len(windows))
        result = run(
            loaded.model,
            windows,
            lambda done, so_far: bar.update(task, completed=done, description=f"perplexity {so_far:.3f}"),
            cached=kv_dtype is not o.KVDType.AUTO,
        )
    weights = "weights as stored" if config is None else f"{config.layout()}, compute {config.compute}"
    return result, weights if kv_dtype is o.KVDType.AUTO else f"{weights}, {kv_dtype.value} cache"
