"""Calibration text: what a quantization algorithm sees of the inputs that a model will get."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..demo import library_files
from ..perplexity import token_windows
from ..quantization import WeightOnlyQuantConfig

#: Windows are drawn from so many times more text than they take.
_CHOICE = 4
#: A file is read up to so many characters per token of that text; English and source code have about four.
_CHARACTERS = 8


@dataclass(frozen=True)
class Samples:
    """Token ids to run a model on.

    Args:
        tokens: int64 [1, S] each.
        source: where they are from, for people.
    """

    tokens: list[Tensor]
    source: str

    def __str__(self) -> str:
        """Return how many of what length, and where from."""
        lengths = sorted({t.shape[1] for t in self.tokens})
        length = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        return f"{len(self.tokens)} samples of {length} tokens from {self.source}"


def calibration_samples(model: Any, config: WeightOnlyQuantConfig) -> Samples:
    """Return the samples that a configuration asks for.

    Text is joined, each piece between the tokenizer's begin and end tokens, and cut into windows; `config.samples` of them are drawn
    with `config.seed`, fewer if there are fewer. The built-in text is the source of the running Python's standard library without the
    files that are held out for measurements.

    Args:
        model: gives the size of the vocabulary, the longest sequence, and the tokenizer's directory if config names none.
        config: its calibration, tokenizer, samples, sequence_length and seed.

    Raises:
        ValueError: the text is missing, too short or of the wrong kind, token ids are out of range, or there is no tokenizer.
    """
    given = config.calibration
    if isinstance(given, Sequence) and not isinstance(given, str) and given and not isinstance(given[0], str):
        chosen = _own_tokens(given, config, model)
        return Samples(chosen, "the given token ids")
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < config.sequence_length:
        raise ValueError(f"sequence_length is {config.sequence_length}; this model takes at most {longest} tokens")
    texts, source = _texts(given, config)
    tokenizer = _tokenizer(model, config)
    wanted = config.samples * _CHOICE if config.samples else None
    try:
        windows = token_windows(tokenizer, texts, config.sequence_length, wanted)
    except ValueError as error:
        raise ValueError(f"calibration text from {source} is too short: {error}") from None
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(config.seed))[: config.samples]
    tokens = [window[None] for window in windows[order]]
    _check_range(tokens, model, "the tokenizer gives")
    return Samples(tokens, source)


def _texts(given: Any, config: WeightOnlyQuantConfig) -> tuple[Iterator[str], str]:
    """Return the texts in random order, a single file's as it is, and a name for them."""
    characters = config.samples * config.sequence_length * _CHOICE * _CHARACTERS
    if given is None:
        files = _shuffled(library_files()[0], config.seed)
        return (_read(file, characters) for file in files), "Python's standard library"
    if isinstance(given, str | os.PathLike):
        path = Path(given).expanduser()
        if not path.is_file():
            raise ValueError(f"calibration is {os.fspath(given)!r}: there is no such file; valid: a text file, a list of texts or "
                             "of token ids, or None for the built-in text")  # fmt: skip
        return iter([_read(path, characters)]), path.name
    if isinstance(given, Sequence) and all(isinstance(text, str) for text in given):
        if not any(given):
            raise ValueError("calibration is a list without text; pass None for the built-in text")
        return iter(_shuffled(given, config.seed)), f"{len(given)} given texts"
    raise ValueError(
        f"calibration is a {type(given).__name__}; valid: a text file's path, a list of texts or of token ids, None"
    )


def _shuffled(items: Sequence[Any], seed: int) -> list[Any]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order.tolist()]


def _read(path: Path, characters: int) -> str:
    try:
        with path.open(encoding="utf-8", errors="ignore") as file:
            return file.read(characters)
    except OSError as error:
        raise ValueError(f"calibration file {path.name} cannot be read: {error.strerror or error}") from None


def _tokenizer(model: Any, config: WeightOnlyQuantConfig) -> Any:
    given = config.tokenizer
    if given is not None and not isinstance(given, str | os.PathLike):
        if not callable(given):
            raise ValueError(f"tokenizer is a {type(given).__name__}; valid: a transformers tokenizer or its directory")
        return given
    source = os.fspath(given) if given is not None else getattr(model, "name_or_path", "")
    advice = "pass tokenizer=... (a tokenizer or its directory), or calibration as a list of token-id tensors"
    if not source:
        raise ValueError(
            f"calibration text needs a tokenizer, and the model has no name_or_path to find it by: {advice}"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=os.path.isdir(source))
    except Exception as error:  # transformers raises many kinds for a directory without a tokenizer
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"calibration text needs a tokenizer, and {source!r} has none ({first}): {advice}") from None


def _own_tokens(given: Sequence[Any], config: WeightOnlyQuantConfig, model: Any) -> list[Tensor]:
    """Return the first samples of a list of token ids, each [S] or [1, S] with S >= 2."""
    tokens = []
    for index, item in enumerate(given[: config.samples]):
        try:
            row = torch.as_tensor(item)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"calibration[{index}] is no row of token ids: {error}") from None
        row = row[None] if row.dim() == 1 else row
        if row.dim() != 2 or row.shape[0] != 1 or row.shape[1] < 2 or row.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"calibration[{index}] is {row.dtype} {list(row.shape)}; expected int64 token ids [S] or [1, S], S at least 2"
            )
        tokens.append(row.to(torch.int64))
    _check_range(tokens, model, "calibration has")
    return tokens


def _check_range(tokens: list[Tensor], model: Any, who: str) -> None:
    size = model.get_input_embeddings().num_embeddings
    low, high = min(int(t.min()) for t in tokens), max(int(t.max()) for t in tokens)
    if low < 0 or high >= size:
        raise ValueError(f"{who} token ids from {low} to {high}; the model has 0 to {size - 1}")
