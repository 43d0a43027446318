"""Ways to run one decode step of an optimized model, in turn: its modules, the captured graph, inductor, AOTInductor.

Example:

    python benchmarks/decode_step.py --shape llama-3.2-1b --depth 512

All run the same operators over the same kind of cache; they differ in what runs between the operators. `operators` is what no way
can go below: the step's operators alone, called one after the other with the arguments they had. AOTInductor's package holds the
weights again: the default shape takes 6 GB of memory and 2 GB in the folder for temporary files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where llmrt is not installed, the checkout serves

import torch
from torch.fx import Interpreter, Node

from llmrt import llm
from llmrt.llm import bench, measure
from llmrt.llm.export import CachedModel
from llmrt.llm.families.shapes import shape_config, shape_names
from llmrt.passes.capture import quiet_modes

WAYS = ("operators", "graph", "modules", "inductor", "aotinductor")
Step = Callable[[], Any]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b", choices=shape_names(), metavar="SHAPE")
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--depth", type=int, default=512, help="tokens in the cache")
    parser.add_argument("--ways", default=",".join(WAYS), help="comma separated")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each way; medians are reported")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args(arguments)
    args.ways = args.ways.split(",")
    if unknown := set(args.ways) - set(WAYS):
        parser.error(f"--ways: unknown {', '.join(sorted(unknown))}; valid: {', '.join(WAYS)}")
    return args


def forward_step(model: Any, depth: int) -> Step:
    """Return a step of the model's forward, which ends where it began: the cache is cropped."""
    cache = llm.KVCache(model.config, max_length=depth + 2)
    ids = torch.randint(3, model.config.vocab_size, (1, depth))
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token, position = ids[:, :1], torch.tensor([[depth]])

    def step() -> Any:
        out = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-1)
        return out.logits

    step()
    return step


def graph_steps(model: Any, depth: int) -> tuple[Step, Step]:
    """Return (the captured graph as it runs, its operators alone)."""
    run = forward_step(model, depth)
    graph = model.forward.graph(lambda key: key.one_token)
    if graph is None:
        raise SystemExit(f"the step runs as modules: {'; '.join(model.forward.reasons)}")
    given: list[Any] = []
    original = graph.run
    graph.run = lambda *args: given.append(args) or original(*args)
    run()
    graph.run = original
    calls: list[tuple[Any, Any, Any]] = []

    class Recorder(Interpreter):
        def run_node(self, node: Node) -> Any:
            if node.op == "call_function" and getattr(node.target, "namespace", "") == "llmrt":
                calls.append((node.target, *self.fetch_args_kwargs_from_env(node)))
            return super().run_node(node)

    with quiet_modes(), torch.no_grad():
        Recorder(graph.captured.module).run(*given[0])

    def operators() -> None:
        for target, args, kwargs in calls:
            target(*args, **kwargs)

    return lambda: original(*given[0]), operators


def tensor_inputs(cached: CachedModel, depth: int, vocabulary: int) -> tuple[Any, ...]:
    """Return the arguments of a `CachedModel` for one token after `depth`."""
    keys, values = cached.caches(1, depth + 1)
    for buffer in (*keys, *values):
        buffer.normal_()
    return torch.randint(3, vocabulary, (1, 1)), torch.ones(1, depth + 1, dtype=torch.int64), keys, values


def steps(args: argparse.Namespace) -> dict[str, Step]:
    """Build the model once per kind of step and return the steps."""
    config = shape_config(args.shape, **({"num_hidden_layers": args.layers} if args.layers else {}))
    model = bench.build(config, bench.Settings(lm_head="int4"))
    found: dict[str, Step] = {}
    if {"graph", "operators"} & set(args.ways):
        found["graph"], found["operators"] = graph_steps(model, args.depth)
    del model.forward  # the graph's stand-in: from here on the modules run
    found["modules"] = forward_step(model, args.depth)
    if {"inductor", "aotinductor"} & set(args.ways):
        cached = CachedModel(model)
        inputs = tensor_inputs(cached, args.depth, config.vocab_size)
        if "inductor" in args.ways:
            compiled = torch.compile(cached, backend="inductor", dynamic=True, fullgraph=True)
            found["inductor"] = lambda: compiled(*inputs)
        if "aotinductor" in args.ways:
            with tempfile.TemporaryDirectory() as folder:
                package = torch._inductor.aoti_compile_and_package(
                    llm.export(model), package_path=str(Path(folder) / "model.pt2")
                )
                loaded = torch._inductor.aoti_load_package(package)
            found["aotinductor"] = lambda: loaded(*inputs)
    return {way: found[way] for way in args.ways}


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        ways = steps(args)
        for step in ways.values():
            step(), step()
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, step in ways.items():
                start = time.perf_counter()
                step()
                times[way].append(time.perf_counter() - start)
    medians = {way: 1e3 * statistics.median(t) for way, t in times.items()}
    first = times[args.ways[0]]
    print(
        f"{args.shape}, INT4 with INT4 head, depth {args.depth}, {args.threads} threads, medians of {args.rounds} steps"
    )
    print(f"{'way':12} {'ms':>8} {'more than ' + args.ways[0]:>22}")
    for way, ms in medians.items():
        more = 1e3 * statistics.median(b - a for a, b in zip(first, times[way], strict=True))
        print(f"{way:12} {ms:8.2f} {more:18.2f} ms")
    if args.json:
        record = {"machine": measure.machine(), "options": {k: str(v) for k, v in vars(args).items()}, "ms": medians}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
