"""The peers that the comparisons measure: their names, their worker processes, and rounds in which they take turns."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # where llmrt is not installed, the checkout with an extension built in place serves

import torch  # noqa: E402
from transformers import AutoConfig, PretrainedConfig  # noqa: E402

from llmrt.llm import measure  # noqa: E402
from llmrt.llm.demo import demo_model_path  # noqa: E402
from llmrt.llm.families.shapes import FIELDS as SHAPE_FIELDS  # noqa: E402
from llmrt.llm.families.shapes import SHAPES, shape_config, shape_names  # noqa: E402

#: Kind of peer -> its variants; a kind without one is its first.
KINDS: dict[str, tuple[str, ...]] = {
    "llmrt": ("int4", "int4-all", "int8", "bf16", "fp32"),
    "llama.cpp": ("q4_0", "q4_k_m", "q8_0"),
    "openvino": ("int4", "int4-d32", "int8"),
    "linears": ("int4", "int8"),
    "torch": ("int4",),
    "torchao": ("int4", "int8"),
    "eager": ("bf16", "fp32"),
    "inductor": ("bf16",),
}
#: Where benchmarks/install_peers.py puts peers by default: outside the checkout.
PEERS_DIR = Path.home() / ".cache" / "llmrt-peers"
#: The packaged demo model, by the name that `llmrt bench` has for it.
DEMO = "demo"
#: What the workers that know no transformers need of a config.
FIELDS = ("model_type", *SHAPE_FIELDS, "rms_norm_eps", "tie_word_embeddings")


def peer_names(text: str) -> list[str]:
    """Parse comma separated peers, KIND or KIND:VARIANT or llama.cpp:FILE.gguf, for argparse.

    Raises:
        argparse.ArgumentTypeError: an unknown or repeated one.
    """
    names = []
    for part in text.split(","):
        kind, _, variant = part.partition(":")
        variants = KINDS.get(kind)
        if variants is None:
            raise argparse.ArgumentTypeError(f"unknown peer {part!r}; valid: {', '.join(KINDS)}")
        variant = variant or variants[0]
        if variant not in variants and not (kind == "llama.cpp" and variant.endswith(".gguf")):
            raise argparse.ArgumentTypeError(f"unknown variant {variant!r} of {kind}; valid: {', '.join(variants)}")
        names.append(f"{kind}:{variant}")
    if len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"a peer is named twice in {text!r}")
    return names


def add_options(parser: argparse.ArgumentParser, peers: str) -> None:
    """Add the options that every comparison has; `peers` is its default."""
    add = parser.add_argument
    kinds = "; ".join(f"{kind}:{'|'.join(variants)}" for kind, variants in KINDS.items())
    add("--shape", default="llama-3.2-1b", choices=(*SHAPES, DEMO), metavar="SHAPE", help=_shapes())
    add("--peers", type=peer_names, default=peers, help=f"comma separated, the first is the one to compare: {kinds}")
    add("--rounds", type=int, default=5, help="measured rounds (medians are reported), after one for warm-up")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every peer, each pinned to a CPU")
    add("--group-size", type=int, default=128, help="of llmrt, torch and openvino in INT4")
    add("--peers-dir", type=Path, default=PEERS_DIR, help="where benchmarks/install_peers.py put them")
    add("--llama-python", type=Path, help="Python with llama-cpp-python, numpy and gguf; default: of --peers-dir")
    add("--openvino-python", type=Path, help="Python with openvino and numpy; default: of --peers-dir")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "llmrt-peers", help="where GGUF files are kept")
    add("--pause", type=float, default=0.5, help="seconds between two runs, until the last one's threads sleep")
    add("--out", type=Path, default=HERE / "results", help="folder for the results")


def _shapes() -> str:
    return ", ".join((*shape_names(), f"{DEMO} (the packaged model)"))


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with a message where an option is unusable; fill in what depends on others."""
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; valid: at least 1")
    cpus = len(os.sched_getaffinity(0))
    if not 1 <= args.threads <= cpus:
        parser.error(f"--threads is {args.threads}; valid: 1 to {cpus}, the CPUs of this process")
    for name, folder, kind in (
        ("llama_python", "llama.cpp", "llama.cpp"),
        ("openvino_python", "openvino", "openvino"),
    ):
        python = getattr(args, name) or args.peers_dir / folder / "bin" / "python"
        setattr(args, name, python)
        if any(peer.startswith(kind) for peer in args.peers) and not python.exists():
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option}: there is no {python}; benchmarks/install_peers.py installs it")


def check_workload(parser: argparse.ArgumentParser, args: argparse.Namespace, load: measure.Workload) -> None:
    """End the program with a message where a peer cannot run a workload."""
    try:
        load.check_length(model_config(args.shape))
    except ValueError as error:
        parser.error(str(error))
    for peer in args.peers:
        kind = peer.partition(":")[0]
        if load.beams > 1 and kind in ("llama.cpp", "openvino"):
            parser.error(f"{peer} has no beam search; leave it out, or use --beams 1")
        if kind == "inductor" and load.depth:
            parser.error(f"{peer} keeps a static cache, which cannot be cut back to a depth; leave it out")


def model_config(shape: str) -> PretrainedConfig:
    """Return the config of a shape or of the demo model."""
    return AutoConfig.from_pretrained(demo_model_path()) if shape == DEMO else shape_config(shape)


def model_fields(shape: str) -> dict[str, Any]:
    """Return the dimensions that the workers without transformers need."""
    config = model_config(shape)
    fields = {name: getattr(config, name) for name in FIELDS}
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields["rope_theta"] = config.rope_parameters["rope_theta"]
    return fields


class Worker:
    """A peer in a process of its own, pinned to the same CPUs as the others, idle between its runs."""

    def __init__(self, command: Sequence[str], cpus: Sequence[int]) -> None:
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

    def run(self, **workload: int) -> dict[str, float]:
        """Do one measured run of a workload (the fields of `measure.Workload`)."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(workload) + "\n")
        self.process.stdin.flush()
        return self._answer("result")

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self, expected: str) -> dict[str, Any]:
        """Return what the process says next, or raise RuntimeError with the error that it reports instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"its process ended with status {self.process.wait()}"}
        if expected not in answer:
            raise RuntimeError(answer.get("error", str(answer)))
        self.facts["peak_memory_bytes"] = answer["peak_memory_bytes"]
        return answer[expected]


def gguf_file(variant: str, args: argparse.Namespace) -> Path:
    """Return the GGUF file of a variant of llama.cpp, written now unless an earlier run did."""
    if variant.endswith(".gguf"):
        return Path(variant)
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / f"{args.shape}-{variant}.gguf"
    if not path.exists():
        part = path.with_suffix(".part")
        writer = [str(args.llama_python), str(HERE / "workers" / "gguf_file.py")]
        subprocess.run([*writer, str(part), json.dumps(model_fields(args.shape)), variant], check=True)
        part.rename(path)
    return path


def command(peer: str, args: argparse.Namespace, loads: Sequence[measure.Workload]) -> list[str]:
    """Return the command line of a peer's worker, which will have to run the workloads."""
    kind, _, variant = peer.partition(":")
    workers, threads = HERE / "workers", f"--threads={args.threads}"
    if kind == "llama.cpp":
        room = [f"--length={max(load.length for load in loads)}", f"--batch={max(load.batch for load in loads)}"]
        return [
            str(args.llama_python),
            str(workers / "llama_cpp_model.py"),
            str(gguf_file(variant, args)),
            threads,
            *room,
        ]
    group = f"--group-size={args.group_size}"
    if kind == "openvino":
        weights, _, dynamic = variant.partition("-d")
        graph = [weights, json.dumps(model_fields(args.shape)), group, f"--dynamic-group={dynamic or 128}"]
        return [str(args.openvino_python), str(workers / "openvino_model.py"), *graph, threads]
    options = [f"--shape={args.shape}", threads, group, f"--torchao={args.peers_dir / 'torchao'}"]
    return [sys.executable, str(workers / "transformers_model.py"), kind, variant, *options]


def measure_peers(args: argparse.Namespace, loads: Sequence[measure.Workload]) -> dict[str, Any]:
    """Load all peers, measure them in turn on every workload and return everything that was seen.

    A peer that cannot be loaded is left out, with its reason in the result, unless it is the one to compare.
    """
    cpus = sorted(os.sched_getaffinity(0))[: args.threads]
    torch.set_num_threads(args.threads)
    workers: dict[str, Worker] = {}
    left_out: dict[str, str] = {}
    try:
        for peer in args.peers:
            print(f"loading {peer}", flush=True)
            try:
                workers[peer] = Worker(command(peer, args, loads), cpus)
            except RuntimeError as error:
                if peer == args.peers[0]:  # everything is compared with it
                    raise
                left_out[peer] = str(error)
                print(f"left out {peer}: {error}", flush=True)
        points = [measure_point(args, workers, load) for load in loads]
    finally:
        for worker in workers.values():
            worker.stop()
    return {
        "shape": args.shape,
        "options": {key: str(value) for key, value in vars(args).items()},
        "machine": measure.machine(),
        "facts": {peer: worker.facts for peer, worker in workers.items()},
        "left_out": left_out,
        "points": points,
    }


def measure_point(args: argparse.Namespace, workers: dict[str, Worker], load: measure.Workload) -> dict[str, Any]:
    """Measure all peers in turn on one workload: rounds whose order rotates, with the limits measured between them."""
    fields, config = measure.workload_fields(load), model_config(args.shape)
    work = measure.count_shape(config, torch.bfloat16, weight_bytes=0)
    rounds: dict[str, list[dict[str, float]]] = {peer: [] for peer in workers}
    peaks, peers = [], list(workers)
    for number in range(args.rounds + 1):
        turn = number % len(peers)
        for peer in peers[turn:] + peers[:turn]:
            time.sleep(args.pause)
            result = workers[peer].run(**fields)
            if number:  # round 0 warms up
                rounds[peer].append(result)
        if number:
            time.sleep(args.pause)
            peaks.append(measure.machine_peaks())
    print(f"measured prompt {load.prompt}, new {load.new}, depth {load.depth}", flush=True)
    return {
        "workload": fields,
        "peaks": peaks,
        "gop_per_prompt": work.prompt_ops(load) / 1e9,
        "attention_gop_per_prompt": attention_ops(config, load) / 1e9,
        "cache_bytes_per_step": work.cache_bytes(load),
        "rounds": rounds,
    }


def attention_ops(config: PretrainedConfig, load: measure.Workload) -> float:
    """Return the operations (two per multiply-accumulate) of a prompt's attention: two products per pair that its mask leaves."""
    text = config.get_text_config()
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    pairs = 0
    for window in measure.count_shape(config, torch.bfloat16, 0).windows:
        seen = range(load.depth + 1, load.depth + load.prompt + 1)
        pairs += sum(min(tokens, window) if window else tokens for tokens in seen)
    return 4.0 * load.batch * text.num_attention_heads * dim * pairs


def write(record: dict[str, Any], stem: Path, text: str) -> None:
    """Write a record as STEM.json and a table as STEM.txt."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(stem.name + ".json").write_text(json.dumps(record, indent=1) + "\n")
    stem.with_name(stem.name + ".txt").write_text(text + "\n")
    print(text)
    print(f"written to {stem}.json, .txt, .png")
