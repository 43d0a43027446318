"""``llmrt quantize``: write a quantized copy of a model."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .loading import Loaded, load


class StoredDType(str, Enum):
    """Values of --weight-dtype here: a format is needed."""

    INT4 = "int4"
    INT4_FULLRANGE = "int4_fullrange"
    INT8 = "int8"
    NF4 = "nf4"
    FP4 = "fp4_e2m1"
    FP8 = "fp8_e4m3"
    FP8_E5M2 = "fp8_e5m2"


class ScaleDType(str, Enum):
    """Values of --scale-dtype."""

    BF16 = "bf16"
    FP32 = "fp32"
    FP16 = "fp16"
    E8M0 = "e8m0"


class Head(str, Enum):
    """Values of --lm-head."""

    INT8 = "int8"
    INT4 = "int4"
    NONE = "none"


class Method(str, Enum):
    """Values of --method."""

    RTN = "rtn"
    GPTQ = "gptq"
    AWQ = "awq"
    AUTOROUND = "autoround"


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=o.MODEL_HELP)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; new or empty.")],
    weight_dtype: Annotated[
        StoredDType, typer.Option("--weight-dtype", help="int4_fullrange uses all 16 codes (symmetric).")
    ] = StoredDType.INT4,
    group_size: o.GroupSizeOption = 128,
    scheme: o.SchemeOption = o.Scheme.SYM,
    scale_dtype: Annotated[
        ScaleDType, typer.Option("--scale-dtype", help="Of the scales; e8m0, powers of two, with fp8.")
    ] = ScaleDType.BF16,
    compute_dtype: o.ComputeDTypeOption = o.ComputeDType.AUTO,
    method: Annotated[
        Method,
        typer.Option("--method", help="rtn: round to nearest; the others look at the model's inputs and take longer."),
    ] = Method.RTN,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", metavar="FILE", help="UTF-8 text to calibrate on; default: Python's standard library."
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Pieces of calibration text.")] = 128,
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens of each piece.")] = 512,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the choice of pieces.")] = 0,
    act_order: Annotated[
        bool, typer.Option("--act-order/--no-act-order", help="gptq: features with large activations first.")
    ] = True,
    damping: Annotated[float, typer.Option("--damping", min=0.0, max=1.0, help="gptq: of the second moments.")] = 0.01,
    lm_head: Annotated[
        Head, typer.Option("--lm-head", help="Format of the output head; none: not quantized.")
    ] = Head.INT8,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", metavar="NAME", help="Leave these linears as they are (name or pattern)."),
    ] = None,
    dtype: o.DTypeOption = o.DType.AUTO,
    threads: o.ThreadsOption = None,
    max_shard_size: o.ShardSizeOption = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace the model in OUT if OUT is not empty.")] = False,
) -> None:
    """Quantize MODEL and write it to OUT, with its tokenizer; every command takes OUT as a model.

    Example: llmrt quantize ./Llama-3.2-1B ./Llama-3.2-1B-int4 --group-size 32

    Example: llmrt quantize ./Llama-3.2-1B ./Llama-3.2-1B-gptq --method gptq --calibration wiki.txt
    """
    check_out(model, out, force)
    config = _config(
        weight_dtype=weight_dtype.value,
        group_size=group_size,
        scheme=scheme.value,
        scale_dtype=scale_dtype.value,
        compute_dtype=compute_dtype.value,
        method=method.value,
        calibration=None if calibration is None else str(calibration),
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        act_order=act_order,
        damping=damping,
        lm_head=False if lm_head is Head.NONE else lm_head.value,
        modules_to_not_convert=skip,
    )
    o.check_shard_size(max_shard_size)
    o.set_threads(threads)
    from rich.console import Console

    console = Console(stderr=True)
    show = console.status(f"quantizing {model} to {config.layout()}")
    with show if method is Method.RTN else nullcontext():  # the others show a bar of their own
        loaded = load(model, dtype.torch(), config)
    with console.status(f"writing {out}"):
        write(loaded, out, max_shard_size)
    report = loaded.model.optimization_report
    megabytes = sum(file.stat().st_size for file in out.iterdir() if file.is_file()) / 1e6
    typer.echo(f"{out}: {config.layout()}, {megabytes:.1f} MB (weights {report.bytes_before / 1e6:.1f} MB before)")


def check_out(model: str, out: Path, force: bool) -> None:
    """Exit unless OUT may be written."""
    if out.exists() and not out.is_dir():
        o.fail(f"{out}: is a file; give a directory")
    if out.is_dir() and Path(model).is_dir() and out.resolve() == Path(model).resolve():
        o.fail(f"{out}: OUT is MODEL itself; give another directory")
    if out.is_dir() and any(out.iterdir()) and not force:
        o.fail(f"{out}: not empty; give another directory, or --force to replace the model in it")


def _config(**values: Any) -> Any:
    from ..quantization import WeightOnlyQuantConfig

    try:
        return WeightOnlyQuantConfig(**values)
    except ValueError as error:
        o.fail(str(error))


def write(loaded: Loaded, out: Path, max_shard_size: str = "5GB") -> None:
    """Write beside OUT first and rename then, so that no half-written model stays behind."""
    from ..model_card import may_write

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        written = Path(temporary) / "model"
        loaded.model.save_pretrained(written, max_shard_size=max_shard_size)
        loaded.tokenizer.save_pretrained(written)
        if out.is_dir() and any(out.iterdir()):
            for old in (*out.glob("*.safetensors"), *out.glob("*.safetensors.index.json")):
                old.unlink()
            for file in written.iterdir():
                if file.name != "README.md" or may_write(out / file.name):
                    shutil.move(file, out / file.name)
            return
        if out.is_dir():
            out.rmdir()
        written.rename(out)
