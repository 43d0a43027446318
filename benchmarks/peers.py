"""Compares llmrt with its peers on one model shape: every peer loads once, then all are measured in turn, round after round.

Example, with llama-cpp-python in a virtual environment of its own:

    python benchmarks/peers.py --llama-python /path/to/venv/bin/python -p 512 -n 64

Writes peers-SHAPE.json, .txt and .png to benchmarks/results. benchmarks/README.md has the rules.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # where llmrt is not installed, the checkout with an extension built in place serves

import torch  # noqa: E402
from peers_report import plot, summarize, table  # noqa: E402

from llmrt import _C  # noqa: E402
from llmrt.llm import measure  # noqa: E402
from llmrt.llm.families.shapes import shape_config, shape_names  # noqa: E402

PEERS = ("llmrt-int4", "llmrt-int8", "llama.cpp", "torch-int4", "bf16")
GGUF_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)


class Worker:
    """A peer in a process of its own, pinned to the same CPUs as the others, idle between its runs."""

    def __init__(self, command: list[str], cpus: list[int]) -> None:
        """Start the process and wait until it has loaded its model."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(len(cpus)),
            "OMP_PROC_BIND": "true",
            "OMP_PLACES": ",".join(f"{{{cpu}}}" for cpu in cpus),
        }
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, cpus),
        )
        self.facts: dict[str, Any] = {}
        self.facts.update(self._answer("ready"))

    def run(self) -> dict[str, float]:
        """Do one measured run."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return self._answer("result")

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self, expected: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"its process ended with status {self.process.wait()}"}
        if expected not in answer:
            raise RuntimeError(f"{self.process.args}: {answer.get('error', answer)}")
        self.facts["peak_memory_bytes"] = answer["peak_memory_bytes"]
        return answer[expected]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", default="llama-3.2-1b", choices=shape_names(), metavar="SHAPE", help=", ".join(shape_names()))
    add(
        "--peers",
        default="llmrt-int4,llama.cpp,torch-int4",
        help=f"comma separated, the first is the one to compare: {', '.join(PEERS)}",
    )
    add("-p", "--prompt", type=int, default=512, help="prompt tokens")
    add("-n", "--new", type=int, default=64, help="new tokens")
    add("--depth", type=int, default=0, help="tokens in the cache before the prompt")
    add("--rounds", type=int, default=5, help="measured rounds (medians are reported), after one for warm-up")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every peer, each pinned to a CPU")
    add("--group-size", type=int, default=128, help="of llmrt and torch-int4")
    add(
        "--lm-head",
        default="int8",
        help="head of llmrt-int4; int8 reads as many bytes as llama.cpp's Q6_K head with Q4_0 layers",
    )
    add("--llama-python", default=sys.executable, help="Python that has llama-cpp-python, numpy and gguf")
    add("--gguf", type=Path, help="GGUF file to measure; by default one with random weights in the shape is written")
    add("--gguf-layers", default="q4_0", choices=("q4_0", "q8_0"), help="format of the layers in the written file")
    add("--gguf-head", default="q6_k", choices=("q4_0", "q6_k", "q8_0"), help="format of its embedding table and head")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "llmrt-peers", help="where the written file is kept")
    add("--pause", type=float, default=0.5, help="seconds between two runs, until the last one's threads sleep")
    add("--out", type=Path, default=HERE / "results", help="folder for the results")
    args = parser.parse_args(arguments)
    args.peers = args.peers.split(",")
    if unknown := [p for p in args.peers if p not in PEERS]:
        parser.error(f"--peers: unknown {', '.join(unknown)}; valid: {', '.join(PEERS)}")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; valid: at least 1")
    cpus = len(os.sched_getaffinity(0))
    if not 1 <= args.threads <= cpus:
        parser.error(f"--threads is {args.threads}; valid: 1 to {cpus}, the CPUs of this process")
    return args


def gguf_fields(shape: str) -> dict[str, Any]:
    """Return the dimensions that workers/gguf_file.py needs."""
    config = shape_config(shape)
    fields = {name: getattr(config, name) for name in GGUF_FIELDS}
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields["rope_theta"] = config.rope_parameters["rope_theta"]
    return fields


def gguf_file(args: argparse.Namespace) -> Path:
    """Return the GGUF file to measure, written now unless an earlier run did."""
    if args.gguf:
        return args.gguf
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / f"{args.shape}-{args.gguf_layers}-{args.gguf_head}.gguf"
    if not path.exists():
        part = path.with_suffix(".part")
        writer = [args.llama_python, str(HERE / "workers" / "gguf_file.py")]
        forms = [args.gguf_layers, args.gguf_head]
        subprocess.run([*writer, str(part), json.dumps(gguf_fields(args.shape)), *forms], check=True)
        part.rename(path)
    return path


def command(peer: str, args: argparse.Namespace) -> list[str]:
    """Return the command line of a peer's worker."""
    load = [f"--{name}={getattr(args, name)}" for name in ("prompt", "new", "depth", "threads")]
    if peer == "llama.cpp":
        return [args.llama_python, str(HERE / "workers" / "llama_cpp_model.py"), str(gguf_file(args)), *load]
    model = [f"--shape={args.shape}", f"--group-size={args.group_size}", f"--lm-head={args.lm_head}"]
    return [sys.executable, str(HERE / "workers" / "transformers_model.py"), peer, *model, *load]


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Load all peers, measure them in turn and return everything that was seen."""
    cpus = sorted(os.sched_getaffinity(0))[: args.threads]
    torch.set_num_threads(args.threads)
    workers: dict[str, Worker] = {}
    peaks: list[dict[str, float | None]] = []
    rounds: dict[str, list[dict[str, float]]] = {peer: [] for peer in args.peers}
    try:
        for peer in args.peers:
            print(f"loading {peer}", flush=True)
            workers[peer] = Worker(command(peer, args), cpus)
        for number in range(args.rounds + 1):
            turn = number % len(args.peers)
            for peer in args.peers[turn:] + args.peers[:turn]:
                time.sleep(args.pause)
                result = workers[peer].run()
                if number:  # round 0 warms up
                    rounds[peer].append(result)
            if number:
                time.sleep(args.pause)
                peaks.append(measure.machine_peaks())
                print(f"round {number} of {args.rounds}", flush=True)
    finally:
        for worker in workers.values():
            worker.stop()
    work = measure.count_shape(shape_config(args.shape), torch.bfloat16, weight_bytes=0)
    load = measure.Workload(args.prompt, args.new, args.depth)
    return {
        "shape": args.shape,
        "workload": measure.workload_fields(load),
        "options": {key: str(value) for key, value in vars(args).items()},
        "machine": measure.machine(),
        "peaks": peaks,
        "gop_per_prompt": work.prompt_ops(load) / 1e9,
        "cache_bytes_per_step": work.cache_bytes(load),
        "peers": {peer: {"facts": workers[peer].facts, "rounds": rounds[peer]} for peer in args.peers},
    }


def main() -> None:
    """Run the comparison and write its results."""
    args = parse()
    record = compare(args)
    rows = summarize(record)
    text = table(record, rows)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"peers-{args.shape}"
    stem.with_name(stem.name + ".json").write_text(json.dumps({**record, "summary": rows}, indent=1) + "\n")
    stem.with_name(stem.name + ".txt").write_text(text + "\n")
    plot(record, rows, stem.with_name(stem.name + ".png"))
    print(text)
    print(f"tier {_C.cpu_isa()}; written to {stem}.json, .txt, .png")


if __name__ == "__main__":
    main()
