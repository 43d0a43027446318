"""The README.md of a saved quantized model: what it is, and that it needs ``import llmrt.llm`` before it is loaded."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from ..ops.formats import Layout
from .quantized import quantized_linears

#: A card with this line was not edited by its owner.
MARK = "<!-- Written by llmrt, and written anew at the next save as long as this line is here. -->"
_EXAMPLE = """\
import llmrt.llm  # first: it tells transformers how to read these weights
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory, or its name on the Hugging Face hub
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer("Hello", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0], skip_special_tokens=True))
"""


def write_card(model: Any, directory: str | os.PathLike[str]) -> None:
    """Write the card of a quantized model, unless its owner has one there.

    (With ``push_to_hub=True`` transformers writes a card of its own over it; upload the directory instead to have this one.)
    """
    card = Path(directory) / "README.md"
    if may_write(card):
        card.write_text(model_card(model), encoding="utf-8")


def may_write(card: Path) -> bool:
    """Return whether there is no card yet, or one of llmrt's that nobody edited."""
    return not card.exists() or (card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace"))


def model_card(model: Any) -> str:
    """Return the card of a quantized model, with the hub's metadata in front."""
    config, base = model.config.quantization_config, base_model(model)
    layouts = Counter(linear.layout for linear in quantized_linears(model))
    about_base = f'base_model: "{base}"\nbase_model_relation: quantized\n' if base else ""
    tags = "".join(f"- {tag}\n" for tag in ("llmrt", *sorted({layout.weight_dtype for layout in layouts})))
    data = f"{about_base}library_name: transformers\npipeline_tag: text-generation\ntags:\n{tags}"
    made = f"converted from {config.source}" if getattr(config, "source", None) else f"by {_method(config)}"
    floating = sum(isinstance(module, nn.Linear) for module in model.modules())
    table = "".join(f"| `{layout}` | {_words(layout)} | {count} |\n" for layout, count in layouts.most_common())
    if floating:
        table += f"| `{str(model.dtype)[6:]}` | floating point | {floating} |\n"
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"`{type(model).__name__}`"
    return (
        f"---\n{data}---\n{MARK}\n\n# {(base or type(model).__name__).rpartition('/')[2]}, quantized for llmrt\n\n"
        f"{origin}, quantized {made}, in the format of llmrt (`quant_method: {config.quant_method}`).\n\n"
        f"| weights | what they are | linear layers |\n| --- | --- | --- |\n{table}\n"
        f"Embeddings and norms are {str(model.dtype)[6:]}.\n\n## Use\n\n```bash\npip install llmrt\n```\n\n"
        "Import `llmrt.llm` before `from_pretrained`. Without it transformers does not know these weights: it goes on with random "
        f"ones, and a warning is all it says.\n\n```python\n{_EXAMPLE}```\n"
    )


def base_model(model: Any) -> str | None:
    """Return the name on the hub of what a model was loaded from, None if it came from a directory."""
    name = str(getattr(model.config, "_name_or_path", None) or "")
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]", name)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not os.path.exists(name) else None


def _method(config: Any) -> str:
    names = {"rtn": "rounding to nearest", "gptq": "GPTQ", "awq": "AWQ", "autoround": "AutoRound"}
    return names.get(getattr(config, "method", ""), "calibration (static INT8, SmoothQuant)")


def _words(layout: Layout) -> str:
    row = layout.format
    kind = f"{row.bits}-bit integers" if row.integer else f"{row.bits}-bit numbers ({row.name})"
    zeros = ", a zero point" if layout.asymmetric else ""
    group = "row" if layout.group_size == -1 else f"{layout.group_size} inputs of a row"
    return f"{kind}{zeros} and a {str(layout.scale_dtype)[6:]} scale for each {group}"
