"""Worker of the comparisons: a transformers model with random weights (or the demo model), run by llmrt or by what torch itself offers.

Every kind is measured through `model.generate`, token choice and Python included.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protocol import serve

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where llmrt is not installed, the checkout serves

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
DEMO = "demo"


def parse() -> argparse.Namespace:
    """Return the options."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("kind", choices=("llmrt", "linears", "torch", "torchao", "eager", "inductor"))
    options.add_argument("variant", choices=("int4", "int4-all", "int8", *DTYPES))
    options.add_argument("--shape", required=True)
    options.add_argument("--threads", type=int, required=True)
    options.add_argument("--group-size", type=int, required=True)
    options.add_argument("--torchao", type=Path, help="folder that holds torchao")
    return options.parse_args()


def settings(args: argparse.Namespace) -> Any:
    """Return how `llmrt bench` would make the model of a kind."""
    from llmrt.llm.bench import Settings

    if args.kind not in ("llmrt", "linears") or args.variant in DTYPES:
        dtype = DTYPES.get(args.variant, "bfloat16")
        return Settings(dtype=dtype, weight_dtype="none", optimize=args.kind == "llmrt")
    head = "int4" if args.variant == "int4-all" else "int8"
    return Settings(weight_dtype=args.variant[:4], group_size=args.group_size, lm_head=head)


def optimized(args: argparse.Namespace) -> Any:
    """Return the model as llmrt makes it; of `linears`, transformers keeps attention, cache and beam search."""
    from llmrt.llm import bench, random_weights
    from llmrt.llm.demo import demo_model_path
    from llmrt.llm.families.shapes import shape_config

    chosen = settings(args)
    if args.kind == "linears":
        if args.shape == DEMO:
            raise ValueError("the peer 'linears' takes a shape, not the demo model")
        model = random_weights.bare_model(shape_config(args.shape), chosen.torch_dtype())
        random_weights.quantized_linears(model, chosen.quantization())
        random_weights.fill_linears(model)
        return only_linears(model, chosen)
    if args.shape == DEMO:
        return bench.load(demo_model_path(), chosen)
    return bench.build(shape_config(args.shape), chosen)


def only_linears(model: Any, chosen: Any) -> Any:
    """Return a model with llmrt's linears and, around them, transformers as it is."""
    from llmrt.llm.optimize import optimize

    options = {"dtype": chosen.torch_dtype(), "quantization_config": chosen.quantization()}
    model = optimize(model, inplace=True, deployment_mode=False, **options)
    model.set_attn_implementation("sdpa")
    return model


def plain(args: argparse.Namespace) -> tuple[Any, int]:
    """Return (the model without llmrt, in what torch offers; bytes of its weights where its tensors do not tell, else 0)."""
    import torch

    from llmrt.llm import bench, random_weights
    from llmrt.llm.demo import demo_model_path
    from llmrt.llm.families.shapes import shape_config

    if args.shape == DEMO:
        model = bench.load(demo_model_path(), settings(args))
    else:
        model = random_weights.bare_model(
            shape_config(args.shape), getattr(torch, DTYPES.get(args.variant, "bfloat16"))
        )
    if args.kind == "torch":
        from torch_int4 import replace_linears

        replace_linears(model, args.group_size)
    random_weights.fill_linears(model)
    if args.kind == "torchao":
        from torchao_model import quantize

        return model, quantize(model, args.variant, args.group_size, args.torchao)
    return model, 0


def compiled_run(model: Any) -> Callable[..., dict[str, float]]:
    """Compile a model with inductor and return the function of one run: transformers' static cache, as it advises."""
    import torch

    from llmrt.llm.timing import generate_timed

    model.compile(backend="inductor")
    model.generation_config.eos_token_id = None  # every run makes exactly `new` tokens

    def run(prompt: int, new: int, depth: int, batch: int, beams: int) -> dict[str, float]:
        if depth:
            raise ValueError(f"depth is {depth}; a static cache cannot be cut back to it")
        tokens = torch.randint(3, model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
        options = {"max_new_tokens": new, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        with torch.inference_mode():
            timing = generate_timed(model, tokens, cache_implementation="static", **options)[1]
        return {"first_token_s": timing.prompt_seconds, "decode_s": timing.step_seconds}

    return run


def generate_run(model: Any, new_cache: Callable[[], Any] | None) -> Callable[..., dict[str, float]]:
    """Return the function of one run; the tokens of a depth stay in the cache for the next run of the same workload."""
    from llmrt.llm import measure

    @functools.lru_cache(maxsize=1)
    def watch(load: Any) -> Any:
        return measure.Stopwatch(model, load, new_cache=new_cache)

    def run(**workload: int) -> dict[str, float]:
        timing = watch(measure.Workload(**workload)).run()
        return {"first_token_s": timing.first, "decode_s": sum(timing.next)}

    return run


def load(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[..., dict[str, float]]]:
    """Build the model and return (facts, function of one run)."""
    import torch
    from transformers import DynamicCache

    from llmrt.llm import measure

    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    ours = args.kind in ("llmrt", "linears")
    model, weight_bytes = (optimized(args), 0) if ours else plain(args)
    unit = settings(args).compute_unit() if ours or args.variant in DTYPES else "int8"
    weight_bytes = weight_bytes or measure.count_work(model, torch.bfloat16).weight_bytes
    if args.kind == "inductor" or (args.kind == "torchao" and args.variant == "int8"):
        run = compiled_run(model)
    else:
        run = generate_run(model, (lambda: DynamicCache(config=model.config)) if args.kind == "linears" else None)
    facts = {
        "load_s": time.perf_counter() - start,
        "version": f"torch {torch.__version__}",
        "weight_bytes": weight_bytes,
        "unit": unit,
        "kv": DTYPES.get(args.variant, "bfloat16"),
    }
    return facts, run


if __name__ == "__main__":
    options = parse()
    serve(lambda: load(options))
