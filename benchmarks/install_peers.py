"""Installs the peers of the comparisons, each into a virtual environment of its own below one folder.

    python benchmarks/install_peers.py --into ~/peers
    python benchmarks/peers.py --peers-dir ~/peers

llama-cpp-python is built from source for this machine (a C++ compiler is needed, minutes); OpenVINO and torchao come as wheels.
torchao is put into a plain folder: it runs in the Python that runs llmrt, over the same torch and transformers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

#: Where benchmarks/peers.py looks by default.
PEERS_DIR = Path.home() / ".cache" / "llmrt-peers"
LLAMA = "llama-cpp-python>=0.3.36"
#: Build flags of llama.cpp: instructions of this CPU, OpenMP threads, no parts that only other backends need.
LLAMA_FLAGS = "-DGGML_NATIVE=ON -DGGML_OPENMP=ON"


def commands(peer: str, folder: Path, pip_options: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """Return the commands, each with its additions to the environment, that install a peer into `folder`."""
    if peer == "torchao":
        target = ["--no-deps", "--target", str(folder)]
        return [([sys.executable, "-m", "pip", "install", "--upgrade", *target, *pip_options, "torchao"], {})]
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", *pip_options]
    if peer == "openvino":
        return [([*pip, "openvino>=2026.4", "numpy"], {})]
    build = {"CMAKE_ARGS": LLAMA_FLAGS}
    return [([*pip, "numpy", "gguf"], {}), ([*pip, "--no-binary", "llama-cpp-python", LLAMA], build)]


def install(peer: str, into: Path, pip_options: list[str]) -> None:
    """Install one peer.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    folder = into / peer
    if peer != "torchao" and not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    for command, additions in commands(peer, folder, pip_options):
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True, env={**os.environ, **additions})


PEERS = ("llama.cpp", "openvino", "torchao")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=PEERS_DIR, help="folder for all of them")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"comma separated, from {', '.join(PEERS)}")
    parser.add_argument(
        "--pip", action="append", default=[], metavar="OPTION", help="passed on to pip install, as --pip=--quiet"
    )
    args = parser.parse_args(arguments)
    args.peers = args.peers.split(",")
    if unknown := [peer for peer in args.peers if peer not in PEERS]:
        parser.error(f"--peers: unknown {', '.join(unknown)}; valid: {', '.join(PEERS)}")
    return args


def main() -> None:
    """Install the peers."""
    args = parse()
    args.into.mkdir(parents=True, exist_ok=True)
    for peer in args.peers:
        install(peer, args.into, args.pip)


if __name__ == "__main__":
    main()
