"""Worker of the comparisons: llama.cpp through the C interface of llama-cpp-python, the way llama-bench measures.

Random tokens; logits of a sequence's last one only; flash attention on, float16 keys and values; weights repacked for the CPU at
load (llama.cpp's default). Decode feeds random tokens too: nothing but `llama_decode` is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import llama_cpp as api
from protocol import serve

#: Tokens of one `llama_decode` in a prompt.
CHUNK = 512


def parse() -> argparse.Namespace:
    """Return the options."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", help="GGUF file")
    options.add_argument("--threads", type=int, required=True)
    options.add_argument("--length", type=int, required=True, help="tokens of the longest sequence")
    options.add_argument("--batch", type=int, required=True, help="most sequences at a time")
    return options.parse_args()


def open_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return (model, context)."""
    api.llama_backend_init()
    model_settings = api.llama_model_default_params()
    model_settings.n_gpu_layers = 0
    model = api.llama_model_load_from_file(args.model.encode(), model_settings)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {args.model}")
    settings = api.llama_context_default_params()
    settings.n_seq_max = args.batch
    settings.n_ctx = args.batch * -(-args.length // 256) * 256
    settings.n_batch = settings.n_ubatch = CHUNK
    settings.n_threads = settings.n_threads_batch = args.threads
    if hasattr(settings, "flash_attn_type"):  # its name changed in 2025
        settings.flash_attn_type = 1
    else:
        settings.flash_attn = True
    context = api.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError("llama.cpp cannot make a context")
    return model, context


class Sequences:
    """Feeds random tokens to a context."""

    def __init__(self, model: Any, context: Any) -> None:
        """Begin with an empty cache."""
        self.context = context
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.batch = api.llama_batch_init(CHUNK, 0, 1)
        #: (sequences, tokens in the cache of each that every run starts from)
        self.kept = (0, 0)

    def start(self, sequences: int, depth: int) -> None:
        """Leave `depth` tokens of each sequence in the cache, computed now unless the last run had the same."""
        memory = api.llama_get_memory(self.context)
        if self.kept == (sequences, depth):
            api.llama_memory_seq_rm(memory, -1, depth, -1)
            return
        api.llama_memory_clear(memory, True)
        self.feed(sequences, 0, depth)
        self.kept = (sequences, depth)

    def feed(self, sequences: int, begin: int, end: int) -> None:
        """Append the tokens of positions `begin` to `end` to all sequences, one sequence after the other, in chunks."""
        waiting = [(s, position) for s in range(sequences) for position in range(begin, end)]
        for first in range(0, len(waiting), CHUNK):
            self._decode(waiting[first : first + CHUNK], end - 1)

    def _decode(self, tokens: list[tuple[int, int]], last: int) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (sequence, position) in enumerate(tokens):
            batch.token[i] = random.randrange(self.vocabulary)
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = position == last
        status = api.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        api.llama_synchronize(self.context)


def load(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[..., dict[str, float]]]:
    """Load the model and return (facts, function of one run)."""
    start = time.perf_counter()
    model, context = open_model(args)
    facts = {
        "load_s": time.perf_counter() - start,
        "version": api.__version__,
        "weight_bytes": api.llama_model_size(model),
        "unit": "int8",
        "kv": "float16",
        "system": api.llama_print_system_info().decode(),
    }
    tokens = Sequences(model, context)

    def run(prompt: int, new: int, depth: int, batch: int, beams: int) -> dict[str, float]:
        if beams != 1:
            raise ValueError(f"beams is {beams}; llama.cpp has no beam search")
        tokens.start(batch, depth)
        begin = time.perf_counter()
        tokens.feed(batch, depth, depth + prompt)
        first = time.perf_counter()
        for position in range(depth + prompt, depth + prompt + new - 1):
            tokens.feed(batch, position, position + 1)
        return {"first_token_s": first - begin, "decode_s": time.perf_counter() - first}

    return facts, run


if __name__ == "__main__":
    options = parse()
    # llama.cpp logs every tensor; errors still come as exceptions.
    silent = api.llama_log_callback(
        lambda level, text, data: sys.stderr.write(text.decode(errors="replace")) if level == 4 else None
    )
    api.llama_log_set(silent, ctypes.c_void_p(0))
    serve(lambda: load(options))
