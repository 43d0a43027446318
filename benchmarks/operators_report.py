"""Tables, extremes and plot of what benchmarks/operators.py measured."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from harness import format_table

#: What a row's figures begin with; the fields before it say what was measured.
FIRST_FIGURE = "us"
#: Fields that a plot has on its axis, the first that a row has.
AXES = ("T", "M", "S")


def names(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that say what a row measured."""
    fields = list(row)
    return {field: row[field] for field in fields[: fields.index(FIRST_FIGURE)]}


def axis_of(row: dict[str, Any]) -> str:
    """Return the field that a row's curve runs over."""
    return next(field for field in AXES if field in row)


def curves(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return label -> (rows or tokens, percent of the limit)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        fields, axis = names(row), axis_of(row)
        at = fields.pop(axis)
        label = " ".join(
            str(v) if isinstance(v, str) else f"{k}={v}" for k, v in fields.items() if k not in ("H", "Hk", "D", "B")
        )
        found.setdefault(label, []).append((at, row["percent"]))
    return found


#: Name -> rows (or tokens) from and to.
SPANS = {"one row": (1, 1), "2 to 32 rows": (2, 32), "more rows": (33, 1 << 30)}


def extremes(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return where we are least ahead of each rival: per program, way to compute and span of rows the ratio and its case."""
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for program, measured in rows.items():
        for row in measured:
            size = row.get("M", row.get("S", 0))
            span = next(name for name, (least, most) in SPANS.items() if least <= size <= most)
            for rival in (field for field in row if field.startswith("x ") and row[field] is not None):
                groups.setdefault((program, row.get("compute", "-"), rival[2:], span), []).append(row)
    found = []
    for (program, compute, rival, span), inside in groups.items():
        worst = min(inside, key=lambda row: row[f"x {rival}"])
        case = ", ".join(f"{field} {value}" for field, value in names(worst).items())
        found.append(
            {
                "of": program,
                "compute": compute,
                "rival": rival,
                "at": span,
                "x least": worst[f"x {rival}"],
                "case": case,
            }
        )
    return found


def table(record: dict[str, Any]) -> str:
    """Return all rows as text, a table per program, and where we are least ahead of each rival."""
    machine, peaks = record["machine"], record["peaks"]
    limits = {kind: median(p[kind] or 0.0 for p in peaks) for kind in peaks[0]}
    lines = [
        f"{record['shape']}, {machine['cpu']}, {machine['threads']} threads, tier {machine['isa']}, bfloat16 activations",
        "limits (medians): " + ", ".join(f"{k} {v / 1e9:.0f}" for k, v in limits.items() if v) + " GB/s, Gop/s",
        "percent: of the limit that binds; x: so many times as fast as that rival in the same run",
    ]
    for program, rows in record["rows"].items():
        lines += ["", program, format_table(rows)]
    worst = extremes(record["rows"])
    if worst:
        lines += ["", "least ahead of rivals", format_table(worst)]
    return "\n".join(lines)


def panels(rows: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return title -> rows of one panel: a program, quantized linears by layout and way to compute."""
    found: dict[str, list[dict[str, Any]]] = {}
    for program, measured in rows.items():
        for row in measured:
            title = " ".join([program, *(row[field] for field in ("layout", "compute") if field in row)])
            kept = {field: value for field, value in row.items() if field not in ("layout", "compute")}
            found.setdefault(title, []).append(kept)
    return found


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw percent of the limit against rows (or tokens)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = panels(record["rows"])
    lines = -(-len(shown) // 2)
    figure, axes = pyplot.subplots(lines, 2, figsize=(13, 1 + 3 * lines), squeeze=False, constrained_layout=True)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (title, rows) in zip(axes.flat, shown.items(), strict=False):
        for i, (label, points) in enumerate(curves(rows).items()):
            axis.plot(
                *zip(*sorted(points), strict=True), label=label, markersize=4, marker="osv^Dx"[i % 6], color=f"C{i}"
            )
        axis.set_xscale("log", base=2)
        ticks = sorted({row[axis_of(row)] for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_ylim(0, 130)
        axis.axhline(100, color="black", linewidth=0.5)
        axis.set_xlabel(axis_of(rows[0]))
        axis.set_ylabel("percent of the limit")
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    machine = record["machine"]
    figure.suptitle(f"{record['shape']}, {machine['cpu']}, {machine['threads']} threads", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
