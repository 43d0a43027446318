"""Worker of benchmarks/peers.py: llama.cpp through the C interface of llama-cpp-python, the way llama-bench measures.

Random tokens; logits of the last one only; flash attention on, float16 keys and values; weights repacked for the CPU at load
(llama.cpp's default). Decode feeds random tokens too: nothing but `llama_decode` is timed.
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


def parse() -> argparse.Namespace:
    """Return the options."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", help="GGUF file")
    for name in ("prompt", "new", "depth", "threads"):
        options.add_argument(f"--{name}", type=int, required=True)
    return options.parse_args()


def load(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[], dict[str, float]]]:
    """Load the model and return (facts, function of one run)."""
    start = time.perf_counter()
    api.llama_backend_init()
    model_settings = api.llama_model_default_params()
    model_settings.n_gpu_layers = 0
    model = api.llama_model_load_from_file(args.model.encode(), model_settings)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {args.model}")
    settings = api.llama_context_default_params()
    settings.n_ctx = -(-(args.depth + args.prompt + args.new) // 256) * 256
    settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = args.threads
    if hasattr(settings, "flash_attn_type"):  # its name changed in 2025
        settings.flash_attn_type = 1
    else:
        settings.flash_attn = True
    context = api.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError("llama.cpp cannot make a context")
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    facts = {
        "load_s": time.perf_counter() - start,
        "version": api.__version__,
        "weight_bytes": api.llama_model_size(model),
        "kv": "float16",
        "system": api.llama_print_system_info().decode(),
    }

    def feed(count: int, step: int) -> None:
        for begin in range(0, count, step):
            size = min(step, count - begin)
            tokens = (api.llama_token * size)(*(random.randrange(vocabulary) for _ in range(size)))
            status = api.llama_decode(context, api.llama_batch_get_one(tokens, size))
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
        api.llama_synchronize(context)

    def run() -> dict[str, float]:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        feed(args.depth, 512)
        begin = time.perf_counter()
        feed(args.prompt, 512)
        first = time.perf_counter()
        feed(args.new - 1, 1)
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
