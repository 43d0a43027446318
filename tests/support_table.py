"""The README's table of what is supported, made from what the tests exercise: ``python -m tests.support_table [--write]``.

Families: collected tests with the mark ``exercises(column)``, one row per value of their parameter `name`. Weight formats: the samples of
quant_linear, which tests/ops/test_operators.py runs on every ISA tier.
"""

import contextlib
import io
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from llmrt.ops import OPERATORS, Layout
from llmrt.ops.formats import COMPUTES

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- support table: begin -->\n", "<!-- support table: end -->\n"
COLUMNS = ("float32", "bfloat16", "int8", "int4")


class Collector:
    """pytest plugin that notes the families of tests that would run."""

    def __init__(self) -> None:
        self.families: defaultdict[str, set[str]] = defaultdict(set)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.note(session.items)

    def note(self, items: Iterable[pytest.Item]) -> None:
        for item in items:
            if not any(item.get_closest_marker(name) for name in ("skip", "skipif", "xfail")):
                for mark in item.iter_markers("exercises"):
                    self.families[item.callspec.params["name"]].add(mark.args[0])


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def collected() -> Collector:
    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()):
        status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/llm")], [collector])
    if status != pytest.ExitCode.OK:
        raise SystemExit(f"the tests cannot be collected: {status!r}")
    return collector


def families(collector: Collector) -> str:
    found = sorted(collector.families.items())
    assert {column for _, columns in found for column in columns} <= set(COLUMNS)
    return table(
        ["family", *COLUMNS], [[name, *("yes" if c in columns else "" for c in COLUMNS)] for name, columns in found]
    )


def formats() -> str:
    groups: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    scales: defaultdict[str, set[str]] = defaultdict(set)
    for sample in OPERATORS["quant_linear"].sample_inputs(torch.float32):
        layout, compute = Layout.parse(sample.args[4]), sample.args[6]
        name = f"{layout.weight_dtype}, {'asymmetric' if layout.asymmetric else 'symmetric'}"
        groups[name, compute].add(layout.group_size)
        scales[name].add(str(layout).rpartition("_")[2])
    # -1, the whole row, comes last
    cells = {
        key: ", ".join("row" if g == -1 else str(g) for g in sorted(sizes, key=lambda g: (g < 0, g)))
        for key, sizes in groups.items()
    }
    return table(
        ["weights", "scales", *(f"compute {c}" for c in COMPUTES)],
        [[n, ", ".join(sorted(scales[n])), *(cells.get((n, c), "") for c in COMPUTES)] for n in sorted(scales)],
    )


def text(collector: Collector) -> str:
    """Return what stands between the markers of the README, from the tests that were collected."""
    tiers = sorted(f"`{file.stem}`" for file in (ROOT / "csrc/tiers").glob("*.cpp"))
    macros = re.findall(r"defined\(EMULATE_(\w+)\)", (ROOT / "tests/ops/emulated_instructions.h").read_text())
    emulated = sorted(f"`{macro.lower()}`" for macro in macros)
    return (
        f"Families, by the dtype of activations or the format of weights:\n\n{families(collector)}\n"
        f"Weight formats, with the group sizes that are tested (any size from 8 on works):\n\n{formats()}\n"
        f"Operators are tested in float32, bfloat16 and float16, on `reference` (plain torch) and on the ISA tiers of the machine, out of\n"
        f"{', '.join(tiers)}. The quantized linears of {' and '.join(emulated)} are also tested over\n"
        f"emulated instructions, on every machine with AVX2.\n"
    )


def main() -> None:
    """Print the text, or write it into the README."""
    made = text(collected())
    if sys.argv[1:] == ["--write"]:
        readme = ROOT / "README.md"
        before, rest = readme.read_text().split(BEGIN)
        readme.write_text(before + BEGIN + made + END + rest.split(END)[1])
    elif sys.argv[1:]:
        raise SystemExit(__doc__)
    else:
        print(made, end="")


if __name__ == "__main__":
    main()
