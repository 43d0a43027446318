"""Medians, table and plot of what benchmarks/peers.py measured."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any


def summarize(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per peer.

    Rates are medians over rounds. A ratio compares the first peer with this one (above 1: the first is faster); it is the median
    of the rounds' own ratios, so that drift of the machine cancels. Percentages are of the medians of the measured limits;
    a limit that the CPU does not have gives None.
    """
    prompt, new = record["workload"]["prompt"], record["workload"]["new"]
    read = median(p["read"] for p in record["peaks"])
    int8 = median(p["int8"] or 0.0 for p in record["peaks"])
    first = next(iter(record["peers"].values()))["rounds"]
    rows = []
    for name, peer in record["peers"].items():
        prefill = [prompt / r["first_token_s"] for r in peer["rounds"]]
        decode = [(new - 1) / r["decode_s"] for r in peer["rounds"]]
        ops = 1e9 * record["gop_per_prompt"] / prompt
        step_bytes = peer["facts"]["weight_bytes"] + record["cache_bytes_per_step"]
        pairs = list(zip(first, peer["rounds"], strict=True))
        rows.append(
            {
                "peer": name,
                "prefill_tokens_per_s": median(prefill),
                "decode_tokens_per_s": median(decode),
                "prefill_ratio": median(b["first_token_s"] / a["first_token_s"] for a, b in pairs),
                "decode_ratio": median(b["decode_s"] / a["decode_s"] for a, b in pairs),
                "percent_of_int8_peak": 100 * ops * median(prefill) / int8 if int8 else None,
                "percent_of_read_bandwidth": 100 * step_bytes * median(decode) / read,
                "weight_megabytes": peer["facts"]["weight_bytes"] / 1e6,
                "peak_memory_megabytes": peer["facts"]["peak_memory_bytes"] / 1e6,
                "load_s": peer["facts"]["load_s"],
            }
        )
    return rows


COLUMNS = (  # field, heading, format
    ("peer", "peer", "s"),
    ("prefill_tokens_per_s", "prefill tok/s", ".1f"),
    ("prefill_ratio", "x", ".2f"),
    ("percent_of_int8_peak", "% int8 peak", ".0f"),
    ("decode_tokens_per_s", "decode tok/s", ".2f"),
    ("decode_ratio", "x", ".2f"),
    ("percent_of_read_bandwidth", "% bandwidth", ".0f"),
    ("weight_megabytes", "weights MB", ".0f"),
    ("peak_memory_megabytes", "peak MB", ".0f"),
    ("load_s", "load s", ".1f"),
)


def table(record: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the rows as text, under a line that says where and how they were measured."""
    cells = [[heading for _, heading, _ in COLUMNS]]
    for row in rows:
        cells.append(["-" if row[field] is None else format(row[field], form) for field, _, form in COLUMNS])
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    names, *numbers = widths
    lines = []
    for name, *values in cells:
        aligned = [value.rjust(width) for value, width in zip(values, numbers, strict=True)]
        lines.append("  ".join([name.ljust(names), *aligned]))
    load, machine = record["workload"], record["machine"]
    gigabytes = median(p["read"] for p in record["peaks"]) / 1e9
    tera = median(p["int8"] or 0.0 for p in record["peaks"]) / 1e12
    head = [
        f"{record['shape']}, random weights, prompt {load['prompt']}, new {load['new']}, depth {load['depth']}; "
        f"medians of {len(record['peaks'])} alternating rounds",
        f"{machine['cpu']}, {machine['threads']} threads, tier {machine['isa']}; measured limits: read {gigabytes:.1f} GB/s, "
        f"int8 {tera:.2f} Top/s",
        f"x: {rows[0]['peer']} is so many times as fast",
    ]
    return "\n".join([*head, "", *lines])


def plot(record: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Draw prefill and decode rates as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 0.6 * len(rows) + 1.6), constrained_layout=True)
    names = [row["peer"] for row in rows]
    colors = ["tab:blue"] + ["tab:gray"] * (len(rows) - 1)
    for axis, kind, percent, limit in (
        (axes[0], "prefill", "percent_of_int8_peak", "int8 peak"),
        (axes[1], "decode", "percent_of_read_bandwidth", "bandwidth"),
    ):
        rates = [row[f"{kind}_tokens_per_s"] for row in rows]
        bars = axis.barh(names, rates, color=colors)
        labels = [
            f"{rate:.1f}" if row[percent] is None else f"{rate:.1f} ({row[percent]:.0f} % of {limit})"
            for rate, row in zip(rates, rows, strict=True)
        ]
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.set_xlim(0, 1.9 * max(rates))
        axis.set_xlabel(f"{kind}, tokens per second")
        axis.invert_yaxis()
    load = record["workload"]
    threads = record["machine"]["threads"]
    figure.suptitle(f"{record['shape']}, prompt {load['prompt']}, new {load['new']}, {threads} threads", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
