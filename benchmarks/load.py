"""Measures how long a model takes to be ready and how much memory that needs at most, each way in a process of its own.

Example: python benchmarks/load.py --shape llama-3.2-1b --rounds 5

Writes load-SHAPE.json and .txt to benchmarks/results. Files are in the system's cache unless --cold is given. llama.cpp joins with
--llama-python PYTHON --gguf FILE (benchmarks/peers.py makes such files).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fleet import Worker

HERE = Path(__file__).resolve().parent
WAYS = ("load and optimize", "quantize on load", "reload quantized", "load GPTQ")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", default="llama-3.2-1b", help="as in llmrt bench")
    add("--rounds", type=int, default=5, help="medians are reported")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--group-size", type=int, default=128)
    add("--lm-head", default="int4", choices=("int4", "int8"))
    add("--directory", type=Path, help="where the models are written, or were by an earlier run; default: temporary")
    add("--cold", action="store_true", help="drop the files from the system's cache before each load")
    add("--llama-python", help="a Python with llama-cpp-python")
    add("--gguf", type=Path, help="the model that llama.cpp loads")
    add("--out", type=Path, default=HERE / "results")
    return parser.parse_args(arguments)


def worker(args: argparse.Namespace, way: str, directory: Path) -> dict[str, Any]:
    """Run one way and return what it reports."""
    config = {"group_size": args.group_size, "lm_head": args.lm_head}
    command = [sys.executable, str(HERE / "workers/load_model.py"), way, str(directory), "--shape", args.shape]
    command += ["--threads", str(args.threads), "--config", json.dumps(config)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def llama_cpp(args: argparse.Namespace) -> dict[str, Any]:
    """Load a GGUF file and run one token."""
    command = [args.llama_python, str(HERE / "workers/llama_cpp_model.py"), str(args.gguf)]
    command += ["--threads", str(args.threads), "--length", "16", "--batch", "1"]
    peer = Worker(command, sorted(os.sched_getaffinity(0))[: args.threads])
    first = peer.run(prompt=8, new=1, depth=0, batch=1, beams=1)["first_token_s"]
    peer.stop()
    return {"load_s": peer.facts["load_s"], "first_token_s": first, "peak_bytes": peer.facts["peak_memory_bytes"]}


def forget(paths: list[Path]) -> None:
    """Drop files from the system's cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Return the record of all ways and rounds."""
    made_file = directory / "made.json"
    if not made_file.is_file():
        made_file.write_text(json.dumps(worker(args, "make", directory)))
    rounds: dict[str, list[dict[str, Any]]] = {}
    files = [*directory.glob("*/*.safetensors"), *([args.gguf] if args.gguf else [])]
    for _ in range(args.rounds):
        for way in (*WAYS, *(["llama.cpp"] if args.llama_python and args.gguf else [])):
            if args.cold:
                forget(files)
            rounds.setdefault(way, []).append(llama_cpp(args) if way == "llama.cpp" else worker(args, way, directory))
    return {
        "shape": args.shape,
        "threads": args.threads,
        "cold": args.cold,
        "made": json.loads(made_file.read_text()),
        "ways": rounds,
    }


def table(record: dict[str, Any]) -> str:
    """Return the record as text: medians; memory in MB, before, at most while loading, and after two first tokens."""
    columns = ("import_s", "load_s", "first_token_s", "next_first_token_s", "before_bytes", "peak_bytes", "after_bytes")
    made = record["made"]
    lines = [
        f"{record['shape']}, {record['threads']} threads, files {'cold' if record['cold'] else 'in the cache'}, "
        f"{made['weight_bytes'] / 1e6:.0f} MB of weights",
        "  ".join(f"{name}: {seconds:.2f} s" for name, seconds in made["seconds"].items()),
        f"{'':20}" + "".join(f"{name.replace('_bytes', '_MB'):>20}" for name in columns),
    ]
    for way, rounds in record["ways"].items():
        line = f"{way:20}"
        for name in columns:
            values = [r[name] for r in rounds if name in r]
            middle = statistics.median(values) if values else None
            text = "" if middle is None else f"{middle:.2f}" if name.endswith("_s") else f"{middle / 1e6:.0f}"
            line += f"{text:>20}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    args = parse(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        record = measure(args, directory)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"load-{args.shape}.json").write_text(json.dumps(record, indent=1))
    (args.out / f"load-{args.shape}.txt").write_text(table(record))
    print(table(record), end="")


if __name__ == "__main__":
    main()
