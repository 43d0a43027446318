"""Worker of benchmarks/peers.py: a transformers model with random weights, run by llmrt or by what torch itself offers.

Every kind is measured by the same code through `model.generate`: llmrt.llm.measure.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protocol import serve

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where llmrt is not installed, the checkout serves

KINDS = ("llmrt-int4", "llmrt-int8", "torch-int4", "bf16")


def parse() -> argparse.Namespace:
    """Return the options."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("kind", choices=KINDS)
    options.add_argument("--shape", required=True)
    options.add_argument("--group-size", type=int, required=True)
    options.add_argument("--lm-head", required=True)
    for name in ("prompt", "new", "depth", "threads"):
        options.add_argument(f"--{name}", type=int, required=True)
    return options.parse_args()


def load(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[], dict[str, float]]]:
    """Build the model and return (facts, function of one run)."""
    import torch

    from llmrt.llm import bench, measure, random_weights
    from llmrt.llm.families.shapes import shape_config

    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    if args.kind.startswith("llmrt"):
        settings = bench.Settings(weight_dtype=args.kind[6:], group_size=args.group_size, lm_head=args.lm_head)
        model = bench.build(shape_config(args.shape), settings)
    else:
        model = random_weights.bare_model(shape_config(args.shape), torch.bfloat16)
        if args.kind == "torch-int4":
            from torch_int4 import replace_linears

            replace_linears(model, args.group_size)
        random_weights.fill_linears(model)
    work = measure.count_work(model, torch.bfloat16)
    watch = measure.Stopwatch(model, measure.Workload(args.prompt, args.new, args.depth))

    def run() -> dict[str, float]:
        timing = watch.run()
        return {"first_token_s": timing.first, "decode_s": sum(timing.next)}

    facts = {
        "load_s": time.perf_counter() - start,
        "version": f"torch {torch.__version__}",
        "weight_bytes": work.weight_bytes,
        "kv": "bfloat16",
    }
    return facts, run


if __name__ == "__main__":
    options = parse()
    serve(lambda: load(options))
