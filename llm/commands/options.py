"""Options that several commands share, and how a command stops with a message."""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    import torch

    from ..quantization import WeightOnlyQuantConfig

#: What names the demo model where a command takes a model.
DEMO = "demo"
MODEL_HELP = "A directory, a name on the Hugging Face hub, or 'demo' for the model in the package."


def fail(message: str) -> NoReturn:
    """Print an error without a traceback and exit with code 2."""
    typer.echo(f"llmrt: error: {message}", err=True)
    raise typer.Exit(2)


def note(message: str) -> None:
    """Print a remark to stderr, so that stdout holds the result alone."""
    typer.echo(f"llmrt: {message}", err=True)


class DType(str, Enum):
    """Values of --dtype."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    def torch(self) -> torch.dtype | None:
        """Return the torch dtype, None for auto."""
        import torch

        return None if self is DType.AUTO else getattr(torch, self.value)


class WeightDType(str, Enum):
    """Values of --weight-dtype where a model may also stay as it is."""

    INT4 = "int4"
    INT8 = "int8"
    NF4 = "nf4"
    FP4 = "fp4_e2m1"
    FP8 = "fp8_e4m3"
    FP8_E5M2 = "fp8_e5m2"
    NONE = "none"


class Scheme(str, Enum):
    """Values of --scheme."""

    SYM = "sym"
    ASYM = "asym"


class ComputeDType(str, Enum):
    """Values of --compute-dtype."""

    AUTO = "auto"
    INT8 = "int8"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class KVDType(str, Enum):
    """Values of --kv-dtype."""

    AUTO = "auto"
    INT8 = "int8"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"

    def name_or_none(self) -> str | None:
        """Return `kv_dtype` of `optimize`, None for auto."""
        return None if self is KVDType.AUTO else self.value


DTypeOption = Annotated[
    DType, typer.Option("--dtype", help="Of everything that is not quantized; auto: as the checkpoint says.")
]
WeightDTypeOption = Annotated[
    WeightDType, typer.Option("--weight-dtype", help="Quantize the linear weights when loading; none: as stored.")
]
GroupSizeOption = Annotated[
    int, typer.Option("--group-size", help="Input features that share a scale: 8 or more, or -1 for whole rows.")
]
SchemeOption = Annotated[Scheme, typer.Option("--scheme", help="asym: a zero point for every group.")]
ComputeDTypeOption = Annotated[
    ComputeDType,
    typer.Option("--compute-dtype", help="Arithmetic of quantized products; auto: int8, of fp8 weights bf16 or fp32."),
]
KVDTypeOption = Annotated[
    KVDType, typer.Option("--kv-dtype", help="Of cached keys and values; int8 halves their bytes. auto: as --dtype.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="What the model runs on: cpu, xpu (Intel GPUs) or cuda, also xpu:1.")
]
ShardSizeOption = Annotated[
    str, typer.Option("--max-shard-size", help="Largest weight file to write, such as 5GB or 500MB.")
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, max=1024, help="CPU threads; default: one per physical core.")
]
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Generate at most so many.")]
TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", min=0.0, help="Sample with this temperature; default and 0: greedy.")
]
TopPOption = Annotated[
    float | None, typer.Option("--top-p", min=0.01, max=1.0, help="Sample from the smallest set with this probability.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Of the sampling; default: a new one every time.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def check_shard_size(text: str) -> None:
    """Exit unless the text is a size as transformers takes it."""
    if re.fullmatch(r"[1-9]\d{0,8}(\.\d+)?\s*(KB|MB|GB|TB)", text, re.IGNORECASE) is None:
        fail(f"--max-shard-size is {text!r}; valid: a number with KB, MB, GB or TB, such as 5GB")


def set_threads(threads: int | None) -> None:
    """Use `threads` CPU threads (None: torch's default)."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def quantization(
    weight_dtype: WeightDType, group_size: int, scheme: Scheme, compute_dtype: ComputeDType
) -> WeightOnlyQuantConfig | None:
    """Return the configuration that the options ask for, or None for weights as stored; exit if they are bad."""
    if weight_dtype is WeightDType.NONE:
        return None
    from ..quantization import WeightOnlyQuantConfig

    try:
        return WeightOnlyQuantConfig(
            weight_dtype=weight_dtype.value,
            group_size=group_size,
            scheme=scheme.value,
            compute_dtype=compute_dtype.value,
        )
    except ValueError as error:
        fail(str(error))


def sampling(temperature: float | None, top_p: float | None, seed: int | None) -> dict[str, object]:
    """Return the arguments of `generate` for greedy (neither option, or temperature 0) or sampled tokens; seed torch."""
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    if temperature == 0 or (temperature is None and top_p is None):
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": 1.0 if temperature is None else temperature,
        "top_p": 1.0 if top_p is None else top_p,
        "top_k": 0,
    }
