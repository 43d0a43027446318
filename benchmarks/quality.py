"""Measures what quantization costs: perplexity of the demo model on the standard library files that it was not trained on.

Example: python benchmarks/quality.py --windows 120

Writes quality.json and quality.txt to benchmarks/results, after every row, and goes on with the rows that are missing there;
--fresh measures all again. Weights of the linears are quantized, the head is not. The rows named "weights" compute in float32, so
that they show the weights' errors alone; the others in what a user gets. Calibration text is the training part of the library.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from llmrt import llm  # noqa: E402
from llmrt.llm.algorithms.calibration import calibration_samples  # noqa: E402
from llmrt.llm.demo import held_out_files  # noqa: E402
from llmrt.llm.perplexity import perplexity, token_windows  # noqa: E402
from llmrt.ops.formats import FORMATS  # noqa: E402


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: of the line.
        options: of the `WeightOnlyQuantConfig`; None: no quantization.
        dtype: of everything that is not quantized.
        alpha: of static INT8; None: weight-only.
    """

    name: str
    options: dict[str, Any] | None
    dtype: torch.dtype = torch.float32
    alpha: float | str | None = None


def _weights(name: str, **options: Any) -> Row:
    """Return a row of float32 arithmetic with float32 scales: the errors of the weights alone."""
    return Row(f"{name}, weights", {"scale_dtype": "fp32", "compute_dtype": "fp32", **options})


def _in_use(name: str, compute: str = "int8", **options: Any) -> Row:
    return Row(name, {"compute_dtype": compute, **options}, torch.bfloat16)


def rows() -> list[Row]:
    """Return the table's lines; formats that this build does not have are left out."""
    lines = [Row("fp32", None), Row("bf16", None, torch.bfloat16)]
    lines += [
        _weights("INT8 rows sym", weight_dtype="int8", group_size=-1),
        _in_use("INT8 rows sym", weight_dtype="int8", group_size=-1),
    ]
    lines += [Row(f"INT8 static, alpha {a}", None, torch.bfloat16, a) for a in (0.5, "auto")]
    for method in ("rtn", "gptq", "awq"):
        for group in (32, 128):
            for scheme in ("sym", "asym"):
                name = f"INT4 g{group} {scheme} {method.upper()}"
                lines.append(_weights(name, group_size=group, scheme=scheme, method=method))
    lines += [_in_use(f"INT4 g128 sym {m.upper()}", group_size=128, method=m) for m in ("rtn", "gptq", "awq")]
    lines.append(_weights("Q4_0", use_ggml=True, group_size=32))
    for name, group in (("nf4", 64), ("fp4_e2m1", 64), ("fp8_e4m3", -1), ("fp8_e5m2", -1)):
        if name in FORMATS:
            shown = f"{name.upper()} {'rows' if group == -1 else f'g{group}'}"
            lines += [_weights(shown, weight_dtype=name, group_size=group)]
            lines += [_in_use(shown, "bf16", weight_dtype=name, group_size=group)]
    return lines


@dataclass
class Table:
    """Results so far, and where they are kept."""

    path: Path
    setting: dict[str, Any]
    values: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def open(path: Path, setting: dict[str, Any], fresh: bool) -> Table:
        table = Table(path, setting)
        if path.is_file() and not fresh:
            found = json.loads(path.read_text())
            if found["setting"] == setting:
                table.values = found["perplexity"]
        return table

    def add(self, name: str, value: float) -> None:
        self.values[name] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"setting": self.setting, "perplexity": self.values}, indent=2) + "\n")
        self.path.with_suffix(".txt").write_text(str(self) + "\n")

    def __str__(self) -> str:
        """Return the table in Markdown; percentages are against the row bf16."""
        base = self.values.get("bf16", self.values.get("fp32", float("nan")))
        lines = ["| weights and arithmetic | perplexity | against bf16 |", "|---|---|---|"]
        for row in rows():
            if row.name in self.values:
                value = self.values[row.name]
                lines.append(f"| {row.name} | {value:.4f} | {value / base - 1:+.2%} |")
        return "\n".join(lines)


def static(model: Any, alpha: float | str, samples: int) -> Any:
    """Return the static INT8 model, head floating point as everywhere here, calibrated as the other methods are."""
    text = calibration_samples(model, llm.WeightOnlyQuantConfig(samples=samples))
    config = llm.StaticQuantConfig(alpha=alpha, lm_head=False)
    prepared = llm.optimize(model, quantization_config=config)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for tokens in text.tokens:
            prepared(tokens.view(1, -1))
        llm.save_qconf_summary(prepared, Path(folder) / "summary.json")
        return llm.optimize(model, quantization_config=config, qconfig_summary_file=Path(folder) / "summary.json")


def measure(row: Row, windows: torch.Tensor, samples: int) -> float:
    """Return the perplexity of one row."""
    model = AutoModelForCausalLM.from_pretrained(llm.demo_model_path(), dtype=row.dtype).eval()
    if row.alpha is not None:
        return perplexity(static(model, row.alpha, samples), windows).value
    config = None
    if row.options is not None:
        config = llm.WeightOnlyQuantConfig(lm_head=False, samples=samples, **row.options)
    return perplexity(llm.optimize(model, inplace=True, quantization_config=config), windows).value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--windows", type=int, default=120, help="of 512 tokens of the held-out files")
    add("--samples", type=int, default=128, help="calibration samples of 512 tokens")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--only", default="", help="rows whose names have this text")
    add("--fresh", action="store_true", help="measure rows again that an earlier run wrote")
    add("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(llm.demo_model_path())
    texts = (file.read_text("utf-8", errors="ignore") for file in held_out_files())
    windows = token_windows(tokenizer, texts, 512, args.windows)
    setting = {
        "windows": len(windows),
        "samples": args.samples,
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
    }
    table = Table.open(args.out / "quality.json", setting, args.fresh)
    for row in rows():
        if args.only in row.name and row.name not in table.values:
            start = time.perf_counter()
            table.add(row.name, measure(row, windows, args.samples))
            print(f"{row.name}: {table.values[row.name]:.4f}  ({time.perf_counter() - start:.0f} s)", flush=True)
    print(table)


if __name__ == "__main__":
    main()
