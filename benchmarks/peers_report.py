"""Medians, table and plot of what benchmarks/peers.py measured."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any


def peak(point: dict[str, Any], unit: str) -> float:
    """Return the median of a limit over a point's rounds; 0 if the CPU lacks the unit."""
    return median(p[unit] or 0.0 for p in point["peaks"])


def summarize(record: dict[str, Any], point: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per peer of one measured workload.

    Rates are medians over rounds, of all sequences together. A ratio compares the first peer with this one (above 1: the first is
    faster); it is the median of the rounds' own ratios, so that drift of the machine cancels. Percentages are of the medians of the
    measured limits; a limit that the CPU does not have gives None.
    """
    load = point["workload"]
    first = next(iter(point["rounds"].values()))
    rows = []
    for name, rounds in point["rounds"].items():
        facts, pairs = record["facts"][name], list(zip(first, rounds, strict=True))
        prompt_s, step_s = median(r["first_token_s"] for r in rounds), median(r["decode_s"] for r in rounds)
        steps = (load["new"] - 1) / step_s
        limit = peak(point, facts["unit"])
        step_bytes = facts["weight_bytes"] + point["cache_bytes_per_step"]
        rows.append(
            {
                "peer": name,
                "unit": facts["unit"],
                "prefill_tokens_per_s": load["batch"] * load["prompt"] / prompt_s,
                "prefill_ratio": median(b["first_token_s"] / a["first_token_s"] for a, b in pairs),
                "percent_of_peak": 100 * 1e9 * point["gop_per_prompt"] / prompt_s / limit if limit else None,
                "decode_tokens_per_s": load["batch"] * steps,
                "decode_ratio": median(b["decode_s"] / a["decode_s"] for a, b in pairs),
                "percent_of_read_bandwidth": 100 * step_bytes * steps / peak(point, "read"),
                "call_s": median(map(_whole, rounds)),
                "call_ratio": median(_whole(b) / _whole(a) for a, b in pairs),
                "weight_megabytes": facts["weight_bytes"] / 1e6,
                "peak_memory_megabytes": facts["peak_memory_bytes"] / 1e6,
                "load_s": facts["load_s"],
            }
        )
    return rows


def _whole(one: dict[str, float]) -> float:
    return one["first_token_s"] + one["decode_s"]


COLUMNS = (  # field, heading, format
    ("peer", "peer", "s"),
    ("prefill_tokens_per_s", "prefill tok/s", ".1f"),
    ("prefill_ratio", "x", ".2f"),
    ("percent_of_peak", "% peak", ".0f"),
    ("unit", "of", "s"),
    ("decode_tokens_per_s", "decode tok/s", ".2f"),
    ("decode_ratio", "x", ".2f"),
    ("percent_of_read_bandwidth", "% bandwidth", ".0f"),
    ("call_s", "call s", ".3f"),
    ("call_ratio", "x", ".2f"),
    ("weight_megabytes", "weights MB", ".0f"),
    ("peak_memory_megabytes", "peak MB", ".0f"),
    ("load_s", "load s", ".1f"),
)


def columns(rows: list[dict[str, Any]], shown: tuple[tuple[str, str, str], ...]) -> list[str]:
    """Return rows as lines of text under their headings; `shown` holds (field, heading, format), the first aligned left."""
    cells = [[heading for _, heading, _ in shown]]
    cells += [["-" if row[field] is None else format(row[field], form) for field, _, form in shown] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]


def heading(record: dict[str, Any], points: list[dict[str, Any]]) -> list[str]:
    """Return the lines that say on what machine, within which limits, and how often was measured."""
    machine, rounds = record["machine"], len(points[0]["peaks"])
    peaks = {unit: median(peak(point, unit) for point in points) for unit in points[0]["peaks"][0]}
    limits = ", ".join(f"{unit} {value / 1e12:.2f} Top/s" for unit, value in peaks.items() if value and unit != "read")
    return [
        f"{machine['cpu']}, {machine['threads']} threads, tier {machine['isa']}; medians of {rounds} alternating rounds",
        f"measured limits: read {peaks['read'] / 1e9:.1f} GB/s, {limits}",
        *(f"left out {peer}: {reason}" for peer, reason in record["left_out"].items()),
    ]


def describe(load: dict[str, int]) -> str:
    """Return a workload as text."""
    extra = "".join(f", {name} {load[name]}" for name in ("batch", "beams") if load[name] > 1)
    return f"prompt {load['prompt']}, new {load['new']}, depth {load['depth']}{extra}"


def table(record: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the rows as text, under lines that say where and how they were measured."""
    point = record["points"][0]
    head = [
        f"{record['shape']}, {describe(point['workload'])}",
        *heading(record, [point]),
        f"x: {rows[0]['peer']} is so many times as fast",
    ]
    return "\n".join([*head, "", *columns(rows, COLUMNS)])


def plot(record: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Draw prefill and decode rates as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 0.5 * len(rows) + 1.6), constrained_layout=True)
    names = [row["peer"] for row in rows]
    colors = [color(name) for name in names]
    for axis, kind, percent in (
        (axes[0], "prefill", "percent_of_peak"),
        (axes[1], "decode", "percent_of_read_bandwidth"),
    ):
        rates = [row[f"{kind}_tokens_per_s"] for row in rows]
        bars = axis.barh(names, rates, color=colors)
        labels = []
        for rate, row in zip(rates, rows, strict=True):
            limit = f"{row['unit']} peak" if kind == "prefill" else "bandwidth"
            share = "" if row[percent] is None else f" ({row[percent]:.0f} % of {limit})"
            labels.append(f"{rate:.1f}{share}")
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.set_xlim(0, 1.9 * max(rates))
        axis.set_xlabel(f"{kind}, tokens per second")
        axis.invert_yaxis()
    load, threads = record["points"][0]["workload"], record["machine"]["threads"]
    figure.suptitle(f"{record['shape']}, {describe(load)}, {threads} threads", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def color(peer: str) -> str:
    """Return the colour that a peer has in every plot: one hue per kind."""
    kinds = {"llmrt": "tab:blue", "llama.cpp": "tab:orange", "openvino": "tab:purple", "linears": "tab:cyan"}
    return kinds.get(peer.partition(":")[0], "tab:gray")
