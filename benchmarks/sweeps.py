"""Sweeps: decode against the tokens that are in the cache, prefill against the prompt's length, of llmrt and its peers in turn.

    python benchmarks/sweeps.py --peers-dir ~/peers --peers llmrt:int4,llama.cpp:q4_0,openvino:int4
    python benchmarks/sweeps.py --peers llmrt:int4 --sweeps decode --depths 0,512,2048 --rounds 3

Writes sweeps-SHAPE.json, .txt and .png to benchmarks/results. benchmarks/README.md has the rules.
"""

from __future__ import annotations

import argparse

from fleet import add_options, check_options, check_workload, measure, measure_peers, write
from sweeps_report import plot, summarize, table

SWEEPS = ("decode", "prefill")


def numbers(text: str) -> list[int]:
    """Parse comma separated integers, for argparse."""
    return [int(part) for part in text.split(",")]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "llmrt:int4,llama.cpp:q4_0")
    parser.add_argument("--sweeps", default=",".join(SWEEPS), help=f"comma separated, from {', '.join(SWEEPS)}")
    parser.add_argument("--depths", type=numbers, default=[0, 512, 2048, 8192], help="of decode: tokens in the cache")
    parser.add_argument("--lengths", type=numbers, default=[32, 128, 512, 2048, 8192], help="of prefill: prompt tokens")
    parser.add_argument("-n", "--new", type=int, default=32, help="tokens that decode generates at a depth")
    parser.add_argument("--name", help="the results are NAME.json, ...; default: sweeps-SHAPE")
    args = parser.parse_args(arguments)
    check_options(parser, args)
    args.sweeps = args.sweeps.split(",")
    if unknown := [sweep for sweep in args.sweeps if sweep not in SWEEPS]:
        parser.error(f"--sweeps: unknown {', '.join(unknown)}; valid: {', '.join(SWEEPS)}")
    try:
        args.workloads = workloads(args)
    except ValueError as error:
        parser.error(str(error))
    for load in args.workloads:
        check_workload(parser, args, load)
    return args


def workloads(args: argparse.Namespace) -> list[measure.Workload]:
    """Return the workloads: of decode a prompt of one token at every depth, of prefill two tokens after every prompt."""
    loads = []
    if "decode" in args.sweeps:
        loads += [measure.Workload(1, args.new, depth) for depth in args.depths]
    if "prefill" in args.sweeps:
        loads += [measure.Workload(length, 2) for length in args.lengths]
    return loads


def main() -> None:
    """Run the sweeps and write their results."""
    args = parse()
    record = measure_peers(args, args.workloads)
    curves = summarize(record)
    stem = args.out / (args.name or f"sweeps-{args.shape}")
    write({**record, "summary": curves}, stem, table(record, curves))
    plot(record, curves, stem.with_name(stem.name + ".png"))


if __name__ == "__main__":
    main()
