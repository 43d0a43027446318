"""``llmrt generate``: continue a prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from . import options as o
from .loading import Loaded, is_model_directory, load


def generate(
    arguments: Annotated[
        list[str], typer.Argument(metavar="[MODEL] PROMPT", help="A model (default: the demo model) and the prompt.")
    ],
    max_new_tokens: o.MaxNewTokensOption = 64,
    weight_dtype: o.WeightDTypeOption = o.WeightDType.NONE,
    group_size: o.GroupSizeOption = 128,
    scheme: o.SchemeOption = o.Scheme.SYM,
    compute_dtype: o.ComputeDTypeOption = o.ComputeDType.AUTO,
    dtype: o.DTypeOption = o.DType.AUTO,
    kv_dtype: o.KVDTypeOption = o.KVDType.AUTO,
    device: o.DeviceOption = "cpu",
    threads: o.ThreadsOption = None,
    temperature: o.TemperatureOption = None,
    top_p: o.TopPOption = None,
    seed: o.SeedOption = None,
    beams: Annotated[int, typer.Option("--beams", min=1, max=64, help="Beam search with so many beams.")] = 1,
) -> None:
    """Continue PROMPT and print the text as it comes, then a line of timings (to stderr).

    MODEL is a directory or a name on the Hugging Face hub; without it the demo model runs, which needs no network.

    Example: llmrt generate "def parse_args("

    Example: llmrt generate ./Llama-3.2-1B "Once upon a time" --weight-dtype int4 --group-size 32
    """
    model, prompt = _model_and_prompt(arguments)
    config = o.quantization(weight_dtype, group_size, scheme, compute_dtype)
    o.set_threads(threads)
    choices = o.sampling(temperature, top_p, seed)
    loaded = load(model, dtype.torch(), config, kv_dtype.name_or_none(), device=device)
    _run(loaded, prompt, max_new_tokens, beams, choices)


def _model_and_prompt(arguments: list[str]) -> tuple[str, str]:
    if len(arguments) > 2:
        o.fail(f"expected [MODEL] PROMPT, got {len(arguments)} arguments; put the prompt in quotes")
    if len(arguments) == 1 and is_model_directory(arguments[0]):
        o.fail(f"the prompt is missing: {arguments[0]} is a model; add a prompt behind it")
    prompt = arguments[-1]
    if not prompt:
        o.fail("the prompt is empty; give at least one character")
    return (arguments[0] if len(arguments) == 2 else o.DEMO), prompt


def _run(loaded: Loaded, prompt: str, max_new_tokens: int, beams: int, choices: dict[str, object]) -> None:
    from transformers import TextStreamer

    from ..timing import generate_timed

    tokens = loaded.tokenizer(prompt, return_tensors="pt").input_ids.to(loaded.model.device)
    if tokens.shape[1] == 0:
        o.fail("the prompt has no token in this model's vocabulary")
    new = loaded.room(tokens.shape[1], max_new_tokens)
    # transformers streams one sequence only, and beams change what was printed already.
    streamer = TextStreamer(loaded.tokenizer, skip_special_tokens=True) if beams == 1 else None
    output, timings = generate_timed(
        loaded.model, tokens, streamer=streamer, max_new_tokens=new, num_beams=beams, **choices
    )
    if streamer is None:
        typer.echo(loaded.tokenizer.decode(output[0], skip_special_tokens=True))
    o.note(str(replace(timings, load_seconds=loaded.seconds)))
