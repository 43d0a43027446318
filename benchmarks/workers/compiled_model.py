"""Worker of benchmarks/compile.py: an untouched bfloat16 transformers model with random weights under one compile backend.

The first `generate`, which compiles, is part of loading; inductor's caches are in a new folder of this process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protocol import serve

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where llmrt is not installed, the checkout serves

KINDS = ("eager", "inductor", "llmrt-eager", "llmrt-inductor")


def parse() -> argparse.Namespace:
    """Return the options."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("kind", choices=KINDS)
    options.add_argument("--shape", required=True)
    options.add_argument("--cache", required=True)
    for name in ("layers", "prompt", "new", "threads"):
        options.add_argument(f"--{name}", type=int, required=True)
    return options.parse_args()


def load(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[], dict[str, float]]]:
    """Build and compile the model and return (facts, function of one run)."""
    import torch

    from llmrt.llm import random_weights
    from llmrt.llm.families.shapes import shape_config
    from llmrt.llm.timing import generate_timed
    from llmrt.passes import llmrt_backend

    torch.set_num_threads(args.threads)
    changes = {"num_hidden_layers": args.layers} if args.layers else {}
    model = random_weights.bare_model(shape_config(args.shape, **changes), torch.bfloat16)
    random_weights.fill_linears(model)
    if args.kind == "inductor":
        model.compile(backend="inductor")
    elif args.kind != "eager":
        model.compile(backend=llmrt_backend, options={"codegen": args.kind.removeprefix("llmrt-")})
    settings = {"max_new_tokens": args.new, "do_sample": False, "pad_token_id": 0}
    if args.cache == "static":
        settings["cache_implementation"] = "static"
    model.generation_config.eos_token_id = None  # every run makes exactly `new` tokens
    tokens = torch.randint(3, model.config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(0))

    def run() -> dict[str, float]:
        with torch.inference_mode():
            timing = generate_timed(model, tokens, **settings)[1]
        return {"first_token_s": timing.prompt_seconds, "decode_s": timing.step_seconds}

    first = run()
    facts = {
        "version": f"torch {torch.__version__}",
        "layers": model.config.num_hidden_layers,
        "first_call_s": first["first_token_s"] + first["decode_s"],
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
    }
    return facts, run


if __name__ == "__main__":
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # the first call is a cold one
        serve(lambda: load(options))
