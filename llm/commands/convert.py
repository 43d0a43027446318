"""``llmrt convert``: write a quantized checkpoint of another format in llmrt's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .loading import load
from .quantize import check_out, write


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A quantized checkpoint: a directory or a name on the hub (GPTQ, AWQ, ...)."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; new or empty.")],
    dtype: o.DTypeOption = o.DType.AUTO,
    compute_dtype: o.ComputeDTypeOption = o.ComputeDType.AUTO,
    max_shard_size: o.ShardSizeOption = "5GB",
    threads: o.ThreadsOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in OUT if OUT is not empty.")] = False,
) -> None:
    """Write the quantized checkpoint SRC to OUT in llmrt's format: the same numbers, and every command takes OUT as a model.

    Example: llmrt convert ./Llama-3.2-1B-GPTQ ./Llama-3.2-1B-int4
    """
    check_out(source, out, force)
    o.check_shard_size(max_shard_size)
    o.set_threads(threads)
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(f"reading {source}"):
        loaded = load(source, dtype.torch(), compute_dtype=compute_dtype.value, quantized_only=True)
    with console.status(f"writing {out}"):
        write(loaded, out, max_shard_size)
    config = loaded.model.config.quantization_config
    megabytes = sum(file.stat().st_size for file in out.iterdir() if file.is_file()) / 1e6
    others = f", {len(config.layouts)} linears in other layouts" if config.layouts else ""
    typer.echo(f"{out}: {config.layout()}{others}, {megabytes:.1f} MB, from {config.source or 'llmrt'}")
