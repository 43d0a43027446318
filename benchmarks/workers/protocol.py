"""How the comparisons talk to their workers: one JSON object per line. Standard library only; every peer's Python imports it."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any


def peak_memory_bytes() -> int:
    """Return the largest resident size that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(load: Callable[[], tuple[dict[str, Any], Callable[..., dict[str, float]]]]) -> None:
    """Load a peer, say so, and do one measured run per line on standard input, a JSON object with a workload, until it closes.

    Args:
        load: returns what the peer is (versions, format, bytes), and the function of one run. That takes the workload's fields
            (prompt, new, depth, batch, beams) and returns ``first_token_s`` and ``decode_s`` (of all tokens after the first).
    """
    # Libraries print to standard output as they like; the protocol keeps its own copy of it.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    try:
        facts, run = load()
        send({"ready": facts, "peak_memory_bytes": peak_memory_bytes()})
        for line in sys.stdin:
            send({"result": run(**json.loads(line)), "peak_memory_bytes": peak_memory_bytes()})
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}"})
        raise
