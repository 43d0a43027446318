"""``llmrt xpu``: kernels for Intel GPUs: compile them ahead, look at what the offline compiler makes of them, see the table of routes."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from importlib import import_module
from typing import Annotated, Any

import typer

from . import options as o

app = typer.Typer(name="xpu", no_args_is_help=True, help="Kernels for Intel GPUs. Example: llmrt xpu build")

DTypeOption = Annotated[o.DType, typer.Option("--dtype", help="Of the activations; auto: bfloat16.")]
FormatsOption = Annotated[list[str], typer.Option("--weight-dtype", help="A format of the weights; may be repeated.")]
ComputeOption = Annotated[o.ComputeDType, typer.Option("--compute-dtype", help="Of quantized products; auto: int8.")]
HeadOption = Annotated[int, typer.Option("--head-dim", min=1, max=256, help="Elements of a head.")]


class GPU(str, Enum):
    """Values of --gpu: the offline compiler's names of Arc and Data Center GPU Max."""

    DG2 = "dg2"
    PVC = "pvc"


def _room(module: str) -> Any:
    """Return a module of the room xpu."""
    from ...devices import xpu_room

    return import_module(f"{xpu_room().__name__}.{module}")


def _programs(dtype: o.DType, formats: list[str], compute: o.ComputeDType, head_dim: int) -> Any:
    import torch

    chosen = "int8" if compute is o.ComputeDType.AUTO else compute.value
    try:
        return _room("sycl.programs").programs(dtype.torch() or torch.bfloat16, tuple(formats), chosen, head_dim)
    except ValueError as error:
        o.fail(str(error))


@app.command()
def build(
    dtype: DTypeOption = o.DType.AUTO,
    weight_dtype: FormatsOption = ["int4", "int8"],  # noqa: B006  (typer copies it)
    compute_dtype: ComputeOption = o.ComputeDType.AUTO,
    head_dim: HeadOption = 128,
) -> None:
    """Compile the SYCL kernels that a model needs into the cache, for the GPU or, without one, for SYCL's CPU device.

    Example: llmrt xpu build --weight-dtype int4 --head-dim 64
    """
    import torch

    toolchain = _room("sycl.toolchain")
    if (lack := toolchain.missing()) is not None:
        o.fail(lack)
    bundles = _programs(dtype, weight_dtype, compute_dtype, head_dim)
    device = torch.device("xpu" if torch.xpu.is_available() else "cpu")
    from rich.console import Console

    console = Console(stderr=True)
    try:
        with console.status("compiling the launcher"):
            toolchain.launcher()
        with console.status(f"compiling {len(bundles)} bundles for {device}"):
            for bundle, seconds in _room("sycl.programs").compile_ahead(device, bundles):
                typer.echo(f"{seconds:6.1f} s  {bundle}")
    except RuntimeError as error:
        o.fail(str(error))
    typer.echo(f"kept in {toolchain.cache_folder()}")


@app.command()
def table(
    gpu: Annotated[list[GPU], typer.Option("--gpu", help="May be repeated.")] = [GPU.DG2, GPU.PVC],  # noqa: B006
    dtype: DTypeOption = o.DType.AUTO,
    weight_dtype: FormatsOption = ["int4", "int8", "nf4", "fp8_e4m3"],  # noqa: B006
    compute_dtype: ComputeOption = o.ComputeDType.AUTO,
    head_dim: HeadOption = 128,
    as_json: o.JsonOption = False,
) -> None:
    """Print SIMD width, registers and spilled bytes of every SYCL kernel on GPUs that need not be here (ocloc compiles).

    Example: llmrt xpu table --gpu dg2 --head-dim 64
    """
    offline = _room("sycl.offline")
    if (lack := _room("sycl.toolchain").missing() or offline.missing()) is not None:
        o.fail(lack)
    bundles = _programs(dtype, weight_dtype, compute_dtype, head_dim)
    try:
        found = [asdict(f) for f in offline.survey(bundles, [one.value for one in gpu])]
    except RuntimeError as error:
        o.fail(str(error))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)


@app.command()
def routes() -> None:
    """Print which kind of kernel serves which operator, dtype and shape, in order of preference.

    Example: llmrt xpu routes
    """
    room = _room("table")
    _room("route").import_routes()
    found = _room("route").ROUTES
    _print(
        [
            {"operator": row.operator, "kind": row.kind, "when": row.when}
            for row in room.TABLE
            if (row.operator, row.kind) in found
        ]
    )


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*map(str, row.values()))
    Console().print(shown)
