"""``llmrt chat``: a conversation."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as o
from .loading import Loaded, load

if TYPE_CHECKING:
    from ..chat import ChatSession


def chat(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=o.MODEL_HELP)] = o.DEMO,
    max_new_tokens: o.MaxNewTokensOption = 256,
    system: Annotated[str | None, typer.Option("--system", help="System message, for models with a template.")] = None,
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
    timings: Annotated[bool, typer.Option("--timings", help="Print timings after every answer.")] = False,
) -> None:
    """Talk with a model; the key/value cache stays, so that every turn costs its new tokens only.

    /reset starts over, /exit (or end of input) leaves. A model without a chat template continues the text.

    Example: llmrt chat ./Qwen3-0.6B --weight-dtype int4 --temperature 0.7
    """
    from ..chat import ChatSession

    config = o.quantization(weight_dtype, group_size, scheme, compute_dtype)
    o.set_threads(threads)
    choices = o.sampling(temperature, top_p, seed)
    loaded = load(model, dtype.torch(), config, kv_dtype.name_or_none(), device=device)
    try:
        session = ChatSession(loaded.model, loaded.tokenizer, system, **choices)
    except ValueError as error:
        o.fail(str(error))
    if not session.uses_template:
        o.note("this model has no chat template: it continues the text that you type")
    _loop(loaded, session, max_new_tokens, timings)


def _loop(loaded: Loaded, session: ChatSession, max_new_tokens: int, timings: bool) -> None:
    while (message := _read()) is not None:
        if message.strip() == "/exit":
            return
        if message.strip() == "/reset":
            session.reset()
            o.note("conversation forgotten")
        elif message.startswith("/"):
            o.note(f"{message}: no such command; there are /reset and /exit")
        elif message.strip():
            _answer(loaded, session, message, max_new_tokens, timings)


def _read() -> str | None:
    """Return the next line without its end, or None at the end of input."""
    if sys.stdin.isatty():
        typer.echo("> ", nl=False, err=True)
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        return None
    return line.rstrip("\r\n") if line else None


def _answer(loaded: Loaded, session: ChatSession, message: str, max_new_tokens: int, timings: bool) -> None:
    from transformers import TextStreamer

    limit, length = loaded.max_tokens, len(session.prompt_tokens(message))
    if limit is not None and length >= limit:
        o.note(f"the conversation would have {length} tokens, the model takes at most {limit}: /reset starts over")
        return
    new = max_new_tokens if limit is None else min(max_new_tokens, limit - length)
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    _, cost = session.send(message, streamer, max_new_tokens=new)
    if timings:
        o.note(f"{cost}, {session.cached_tokens} tokens cached")
