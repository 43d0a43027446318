"""Which reader belongs to a checkpoint: one line per format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import auto_round, awq, gptq
from .reader import Reader

#: (whether a `quantization_config` is the format's, the reader's class), asked in this order.
READERS: tuple[tuple[Callable[[Mapping[str, Any]], bool], Callable[[Mapping[str, Any]], Reader]], ...] = (
    (gptq.matches, gptq.GptqReader),
    (awq.matches, awq.AwqReader),
    (auto_round.matches, auto_round.AutoRoundReader),
)


def find_reader(config: Mapping[str, Any]) -> Reader:
    """Return the reader of a checkpoint by the `quantization_config` of its config.json.

    Raises:
        ValueError: no reader knows it, or the one that does refuses its values.
    """
    for matches, reader in READERS:
        if matches(config):
            return reader(config)
    shown = {key: config[key] for key in ("quant_method", "format", "checkpoint_format", "bits") if key in config}
    raise ValueError(f"quantization_config is of a format that cannot be read: {shown or dict(config)!r:.300}")
