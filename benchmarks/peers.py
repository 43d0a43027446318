"""Compares llmrt with its peers on one model and workload: every peer loads once, then all are measured in turn, round after round.

    python benchmarks/install_peers.py --into ~/peers
    python benchmarks/peers.py --peers-dir ~/peers -p 512 -n 64
    python benchmarks/peers.py --peers llmrt:int4,linears:int4 --beams 4 -p 1024 -n 128
    python benchmarks/peers.py --shape demo --peers llmrt:bf16,llmrt:int4,eager:bf16,eager:fp32 -p 32 -n 256

Writes peers-SHAPE.json, .txt and .png to benchmarks/results. benchmarks/README.md has the rules.
"""

from __future__ import annotations

import argparse

from fleet import add_options, check_options, check_workload, measure, measure_peers, write
from peers_report import plot, summarize, table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "llmrt:int4,llama.cpp:q4_0,torch:int4")
    for short, name, default, text in (
        ("-p", "prompt", 512, "prompt tokens"),
        ("-n", "new", 64, "new tokens"),
        ("-d", "depth", 0, "tokens in the cache before the prompt"),
        ("-b", "batch", 1, "sequences"),
        ("-k", "beams", 1, "beams per sequence; 1 is greedy"),
    ):
        parser.add_argument(short, f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--name", help="the results are NAME.json, ...; default: peers-SHAPE")
    args = parser.parse_args(arguments)
    check_options(parser, args)
    try:
        args.workload = measure.Workload(args.prompt, args.new, args.depth, args.batch, args.beams)
    except ValueError as error:
        parser.error(str(error))
    check_workload(parser, args, args.workload)
    return args


def main() -> None:
    """Run the comparison and write its results."""
    args = parse()
    record = measure_peers(args, [args.workload])
    rows = summarize(record, record["points"][0])
    stem = args.out / (args.name or f"peers-{args.shape}")
    write({**record, "summary": rows}, stem, table(record, rows))
    plot(record, rows, stem.with_name(stem.name + ".png"))


if __name__ == "__main__":
    main()
