"""``llmrt bench``: latency, throughput and how near both come to the machine's limits, of a model or of a model's shape.

Shapes have random weights: speed does not depend on their values, and nothing has to be downloaded.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands.options import (
    DEMO,
    ComputeDType,
    ComputeDTypeOption,
    DType,
    DTypeOption,
    GroupSizeOption,
    KVDType,
    KVDTypeOption,
    Scheme,
    SchemeOption,
    ThreadsOption,
    WeightDType,
    WeightDTypeOption,
    fail,
    set_threads,
)
from .demo import demo_model_path

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from .measure import Workload
    from .quantization import WeightOnlyQuantConfig

DTYPES = ("float32", "bfloat16", "float16")
HEADS: dict[str, bool | str] = {"int8": "int8", "int4": "int4", "none": False}


@dataclass(frozen=True)
class Settings:
    """How the model is made.

    Args:
        dtype: of everything that is not quantized: float32, bfloat16 or float16.
        weight_dtype: int4, int8, or none for floating-point weights.
        compute_dtype: of quantized products: auto, int8, bf16, fp16 or fp32.
        group_size: input features that share a scale; -1 for whole rows.
        scheme: sym or asym.
        lm_head: int8, int4, or none for a floating-point head.
        optimize: False measures plain transformers (only with weight_dtype none).
        kv_dtype: of cached keys and values: int8, float16, bfloat16, float32, or auto for dtype.

    Raises:
        ValueError: a value is outside these.
    """

    dtype: str = "bfloat16"
    weight_dtype: str = "int4"
    compute_dtype: str = "auto"
    group_size: int = 128
    scheme: str = "sym"
    lm_head: str = "int8"
    optimize: bool = True
    kv_dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check the fields that WeightOnlyQuantConfig does not see."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; valid: {', '.join(DTYPES)}")
        if self.lm_head not in HEADS:
            raise ValueError(f"lm_head is {self.lm_head!r}; valid: {', '.join(HEADS)}")
        if not self.optimize and self.weight_dtype != "none":
            raise ValueError(f"weight_dtype is {self.weight_dtype!r} without optimize; plain transformers needs none")
        if not self.optimize and self.kv_dtype != "auto":
            raise ValueError(f"kv_dtype is {self.kv_dtype!r} without optimize; plain transformers needs auto")
        self.quantization(), self.stored_dtype()

    def stored_dtype(self) -> torch.dtype:
        """Return the dtype of cached keys and values as torch has it."""
        from .cache import stored_dtype

        return stored_dtype(self.kv_dtype_or_none(), self.torch_dtype()) or self.torch_dtype()

    def kv_dtype_or_none(self) -> str | None:
        """Return `kv_dtype` of `optimize`."""
        return None if self.kv_dtype == "auto" else self.kv_dtype

    def torch_dtype(self) -> torch.dtype:
        """Return the dtype as torch has it."""
        import torch

        return getattr(torch, self.dtype)

    def quantization(self) -> WeightOnlyQuantConfig | None:
        """Return the configuration for `optimize`; None for floating-point weights."""
        from .quantization import WeightOnlyQuantConfig

        if self.weight_dtype == "none":
            return None
        return WeightOnlyQuantConfig(
            weight_dtype=self.weight_dtype,
            compute_dtype=self.compute_dtype,
            group_size=self.group_size,
            scheme=self.scheme,
            lm_head=HEADS[self.lm_head],
        )

    def compute_unit(self) -> str:
        """Return which peak bounds the prompt: int8, bf16 or fp32."""
        config = self.quantization()
        compute = (
            {"float32": "fp32", "bfloat16": "bf16", "float16": "fp32"}[self.dtype] if config is None else config.compute
        )
        return "fp32" if compute == "fp16" else compute


def build(config: PretrainedConfig, settings: Settings, device: str = "cpu") -> PreTrainedModel:
    """Return a model of a config with random weights, optimized as the settings say, on a device.

    Quantized weights are drawn as codes, one linear at a time: a 7B model in INT4 takes 4 GB, at no time more than 8.
    """
    from .optimize import optimize
    from .random_weights import bare_model, fill_linears, quantized_linears

    model, quantization = bare_model(config, settings.torch_dtype()), settings.quantization()
    if quantization is not None:
        quantized_linears(model, quantization)
    fill_linears(model)
    if not settings.optimize:
        return model.to(device)
    return optimize(
        model,
        dtype=settings.torch_dtype(),
        inplace=True,
        device=device,
        quantization_config=quantization,
        kv_dtype=settings.kv_dtype_or_none(),
    )


def load(directory: Path, settings: Settings) -> PreTrainedModel:
    """Return the model of a directory, optimized as the settings say."""
    import transformers

    from .checkpoints import AutoModelForCausalLM
    from .checkpoints.configuration import stored_quantization

    if not settings.optimize:
        return transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=settings.torch_dtype(), local_files_only=True
        )
    stored = stored_quantization(_stored_config(directory), str(directory)) is not None
    return AutoModelForCausalLM.from_pretrained(
        directory,
        quantization_config=None if stored else settings.quantization(),
        dtype=settings.torch_dtype(),
        kv_dtype=settings.kv_dtype_or_none(),
        local_files_only=True,
    )


def measure_model(
    model: PreTrainedModel, settings: Settings, workload: Workload, iterations: int, warmup: int
) -> dict[str, Any]:
    """Run a workload and return what ``--json`` holds but the model's name and loading time."""
    from . import measure

    watch = measure.Stopwatch(model, workload)
    for _ in range(warmup):
        watch.run()
    results = measure.summarize([watch.run() for _ in range(iterations)], workload)
    memory = measure.peak_memory_bytes()  # before the probes take theirs
    peaks = measure.machine_peaks()
    work = measure.count_work(model, settings.stored_dtype())
    return {
        "workload": measure.workload_fields(workload),
        "results": results,
        "limits": measure.relate(results, work, workload, peaks, settings.compute_unit()),
        "weight_bytes": work.weight_bytes,
        "peak_memory_bytes": memory,
        "peaks": peaks,
        "machine": measure.machine(),
    }


def as_table(record: dict[str, Any]) -> str:
    """Return the record as text."""
    load, results, limits, machine = (record[key] for key in ("workload", "results", "limits", "machine"))
    peaks, unit = record["peaks"], limits["compute_unit"]
    sequences = f", batch {load['batch']}" * (load["batch"] > 1) + f", {load['beams']} beams" * (load["beams"] > 1)
    lines = [
        ("model", f"{record['model']}, {_settings_text(record['settings'])}"),
        ("machine", f"{machine['cpu']}, {machine['threads']} threads, tier {machine['isa']}"),
        ("workload", f"prompt {load['prompt']}, new {load['new']}, depth {load['depth']}{sequences}"),
        ("load", f"{record['load_s']:.1f} s"),
        ("first token", f"{results['first_token_ms']:.1f} ms"),
        (
            "next token",
            f"{results['next_token_ms']:.2f} ms median, {results['next_token_p90_ms']:.2f} ms 90th percentile",
        ),
        (
            "prefill",
            f"{results['prefill_tokens_per_s']:.1f} tok/s, {_percent(limits['percent_of_compute_peak'])} of the {unit} peak",
        ),
        (
            "decode",
            f"{results['decode_tokens_per_s']:.2f} tok/s, {_percent(limits['percent_of_read_bandwidth'])} of the read bandwidth",
        ),
        ("weights", f"{record['weight_bytes'] / 1e6:.1f} MB read per token"),
        ("peak memory", f"{record['peak_memory_bytes'] / 1e6:.0f} MB"),
        (
            "limits",
            f"read {peaks['read'] / 1e9:.1f} GB/s, "
            + ", ".join(f"{k} {v / 1e9:.0f} Gop/s" for k, v in peaks.items() if v and k != "read"),
        ),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines)


def _percent(value: float | None) -> str:
    return "no measure" if value is None else f"{value:.1f} %"


def _settings_text(settings: dict[str, Any]) -> str:
    cache = "" if settings["kv_dtype"] == "auto" else f", {settings['kv_dtype']} cache"
    if settings["weight_dtype"] == "none":
        return f"{settings['dtype']} weights" + ("" if settings["optimize"] else ", plain transformers") + cache
    group = "rows" if settings["group_size"] == -1 else f"groups of {settings['group_size']}"
    head = "floating-point" if settings["lm_head"] == "none" else settings["lm_head"]
    return (
        f"{settings['weight_dtype']} {settings['scheme']} in {group}, {head} head, compute {settings['compute_dtype']}, "
        f"{settings['dtype']} activations{cache}"
    )


def bench(
    model: Annotated[
        Path | None, typer.Argument(help="A model's directory or 'demo'; or give --shape.", show_default=False)
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="A known model's dimensions with random weights; 'list' prints them.")
    ] = None,
    prompt: Annotated[int, typer.Option("-p", "--prompt", min=1, help="Prompt tokens.")] = 512,
    new: Annotated[int, typer.Option("-n", "--new", min=2, help="Tokens to generate.")] = 64,
    depth: Annotated[int, typer.Option(min=0, help="Tokens in the cache before the prompt; they are not timed.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    beams: Annotated[int, typer.Option(min=1, help="Beams per sequence; 1 is greedy.")] = 1,
    dtype: DTypeOption = DType.AUTO,
    kv_dtype: KVDTypeOption = KVDType.AUTO,
    weight_dtype: WeightDTypeOption = WeightDType.INT4,
    compute_dtype: ComputeDTypeOption = ComputeDType.AUTO,
    group_size: GroupSizeOption = 128,
    scheme: SchemeOption = Scheme.SYM,
    lm_head: Annotated[
        str, typer.Option(help="Of a quantized model: int8, int4, or none for floating point.")
    ] = "int8",
    plain: Annotated[
        bool, typer.Option("--plain", help="Measure transformers without llmrt (needs --weight-dtype none).")
    ] = False,
    threads: ThreadsOption = None,
    iters: Annotated[int, typer.Option(min=1, help="Measured runs; medians are reported.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before them.")] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file; '-' prints them.")
    ] = None,
    table: Annotated[bool, typer.Option("--table/--no-table", help="Print the table.")] = True,
) -> None:
    """Measure first and next token latency, throughput, and how near they come to the machine's limits.

    Everything runs through the model's own `generate`, on random tokens. The prompt's percentage counts the operations of the
    linear layers, against the peak of the unit that computes them; the decode's counts the bytes of weights and of cached keys and
    values, against the read bandwidth. Both limits are measured in the same process after the model.

    Example: llmrt bench --shape llama-3.2-1b --weight-dtype int4 -p 512 -n 64
    """
    from .families.shapes import shape_config, shape_names
    from .measure import Workload

    if shape == "list":
        typer.echo("\n".join(shape_names()))
        return
    if (model is None) == (shape is None):
        fail(f"give either a model directory or --shape; shapes: {', '.join(shape_names())}")
    if json_file is not None and not json_file.parent.is_dir():
        fail(f"--json {json_file}: there is no folder {json_file.parent}")
    if str(model) == DEMO:
        model = demo_model_path()
    set_threads(threads)
    try:
        workload = Workload(prompt, new, depth, batch, beams)
        config = shape_config(shape) if shape is not None else _stored_config(model)  # type: ignore[arg-type]
        workload.check_length(config)
        weights = {
            "weight_dtype": weight_dtype.value,
            "compute_dtype": compute_dtype.value,
            "group_size": group_size,
            "scheme": scheme.value,
            "lm_head": lm_head,
        }
        settings = Settings(
            _dtype_name(dtype, config),
            **(_stored_weights(getattr(config, "quantization_config", None)) or weights),
            optimize=not plain,
            kv_dtype=kv_dtype.value,
        )
        start = time.perf_counter()
        made = build(config, settings) if shape is not None else load(model, settings)  # type: ignore[arg-type]
        load_s = time.perf_counter() - start
        if (stored := getattr(made.config, "quantization_config", None)) is not None:  # what a checkpoint had
            settings = replace(settings, **(_stored_weights(stored.to_dict()) or {}))
    except (ValueError, OSError) as error:
        fail(str(error))
    record = {
        "model": shape or str(model),
        "settings": asdict(settings),
        "load_s": load_s,
        **measure_model(made, settings, workload, iters, warmup),
    }
    if table:
        typer.echo(as_table(record))
    if json_file is not None:
        text = json.dumps(record, indent=1) + "\n"
        if str(json_file) == "-":
            typer.echo(text, nl=False)
        else:
            json_file.write_text(text)


def _stored_weights(stored: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the settings of weights that llmrt quantized, from their `quantization_config`: they replace the options; else None."""
    if stored is None or stored.get("quant_method") != "llmrt":
        return None
    names = ("weight_dtype", "compute_dtype", "group_size", "scheme")
    head = stored["lm_head"]
    return {**{name: stored[name] for name in names}, "lm_head": {True: "int8", False: "none"}.get(head, head)}


def _stored_config(directory: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} is not a model directory: it has no config.json")
    return AutoConfig.from_pretrained(directory, local_files_only=True)


def _dtype_name(dtype: DType, config: PretrainedConfig) -> str:
    """Return the name of the dtype; auto: as the checkpoint says, bfloat16 for a shape."""
    if dtype is not DType.AUTO:
        return dtype.value
    return str(config.dtype or "bfloat16").removeprefix("torch.")


if __name__ == "__main__":
    typer.run(bench)
