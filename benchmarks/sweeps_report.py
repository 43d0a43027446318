"""Curves, table and plot of what benchmarks/sweeps.py measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers_report import color, columns, heading, peak
from peers_report import summarize as summarize_point

#: Sweep -> (what it varies, rate, its percentage, its ratio to the first peer).
FIELDS = {
    "decode": ("depth", "decode_tokens_per_s", "percent_of_read_bandwidth", "decode_ratio"),
    "prefill": ("prompt", "prefill_tokens_per_s", "percent_of_compute_limit", "prefill_ratio"),
}


def sweep_of(point: dict[str, Any]) -> str:
    """Return which sweep a point belongs to: decode feeds prompts of one token."""
    return "decode" if point["workload"]["prompt"] == 1 else "prefill"


def summarize(record: dict[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return sweep -> peer -> points with ``at`` (depth or length), ``tokens_per_s``, ``percent`` of the limit, and ``ratio``.

    Decode's limit is the read bandwidth. Prefill's is the time of the linears' operations at the peak of the peer's unit and of
    attention's at the bf16 peak (fp32 where the CPU lacks it); without the unit the percentage is None.
    """
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for point in record["points"]:
        sweep = sweep_of(point)
        at, rate, percent, ratio = FIELDS[sweep]
        for row in summarize_point(record, point):
            row["percent_of_compute_limit"] = compute_percent(point, row)
            curve = curves.setdefault(sweep, {}).setdefault(row["peer"], [])
            curve.append(
                {
                    "at": point["workload"][at],
                    "tokens_per_s": row[rate],
                    "percent": row[percent],
                    "ratio": row[ratio],
                }
            )
    return curves


def compute_percent(point: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Return the percentage of prefill's limit that a peer reaches."""
    limit, attention = peak(point, row["unit"]), peak(point, "bf16") or peak(point, "fp32")
    if not limit:
        return None
    floor_s = 1e9 * (point["gop_per_prompt"] / limit + point["attention_gop_per_prompt"] / attention)
    load = point["workload"]
    return 100 * floor_s * row["prefill_tokens_per_s"] / (load["batch"] * load["prompt"])


def table(record: dict[str, Any], curves: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Return a table per sweep: a line per peer, tok/s and percent of the limit per point."""
    lines = [record["shape"], *heading(record, record["points"])]
    for sweep, peers in curves.items():
        points = [point["at"] for point in next(iter(peers.values()))]
        limit = "read bandwidth" if sweep == "decode" else "compute limit, attention included"
        first = next(iter(peers))
        lines += ["", f"{sweep}, tok/s (% of {limit}; {first} is so many times as fast), against {FIELDS[sweep][0]}:"]
        shown = (("peer", "peer", "s"), *((str(at), str(at), "s") for at in points))
        rows = [{"peer": peer, **{str(p["at"]): _cell(p) for p in curve}} for peer, curve in peers.items()]
        lines += columns(rows, shown)
    return "\n".join(lines)


def _cell(point: dict[str, Any]) -> str:
    percent = "-" if point["percent"] is None else f"{point['percent']:.0f} %"
    return f"{point['tokens_per_s']:.1f} ({percent}; {point['ratio']:.2f})"


def plot(record: dict[str, Any], curves: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Draw rates (above) and percentages (below) against depth and length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(curves), figsize=(6 * len(curves), 7), squeeze=False, sharex="col", constrained_layout=True
    )
    for column, (sweep, peers) in enumerate(curves.items()):
        for peer, curve in peers.items():
            at = [point["at"] for point in curve]
            style = {"color": color(peer), "marker": "os^vD"[list(peers).index(peer) % 5], "label": peer}
            axes[0][column].plot(at, [point["tokens_per_s"] for point in curve], **style)
            if all(point["percent"] is not None for point in curve):
                axes[1][column].plot(at, [point["percent"] for point in curve], **style)
        limit = "read bandwidth" if sweep == "decode" else "compute limit"
        axes[0][column].set_ylabel(f"{sweep}, tokens per second")
        axes[1][column].set_ylabel(f"percent of the {limit}")
        axes[1][column].set_xlabel("tokens in the cache" if sweep == "decode" else "tokens of the prompt")
        for axis in (axes[0][column], axes[1][column]):
            axis.set_xscale("symlog" if sweep == "decode" else "log", base=2, **_linear_to(sweep))
            axis.set_xticks(at, [str(tokens) for tokens in at], minor=False)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        axes[0][column].legend(fontsize=8)
    machine = record["machine"]
    figure.suptitle(f"{record['shape']}, {machine['cpu']}, {machine['threads']} threads", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _linear_to(sweep: str) -> dict[str, int]:
    """Return up to where a depth axis, which begins at 0, is linear."""
    return {"linthresh": 256} if sweep == "decode" else {}
