"""The table of operators per decoder layer in benchmarks/README.md: ``python -m tests.operator_table [--write]``.

For each family: the calls in the graph of one decode step of an untouched bfloat16 model (2 left-padded prompts), before the
rewrites and after them. The counts of a layer are those of a model with one layer more, minus those of the model.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from llmrt.passes import REWRITES, llmrt_backend, retrace, rewrite

from .support_table import ROOT, table

sys.path.insert(0, str(ROOT / "tests/llm"))

from compiled_models import CACHES, FAMILIES, NO_FULLGRAPH, Decoding, small_model
from models import padded_batch

README = Path("benchmarks/README.md")
BEGIN, END = "<!-- operator table: begin -->\n", "<!-- operator table: end -->\n"

#: Operators that make another view of the same elements (reshape may copy them).
VIEWS = {
    *(
        "alias",
        "chunk",
        "detach",
        "expand",
        "expand_as",
        "flatten",
        "mT",
        "narrow",
        "permute",
        "reshape",
        "select",
        "slice",
    ),
    *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view"),
}

#: Fewest layers of a family's model: with one more, the added layer is the family's last kind.
LAYERS = {"qwen2": 2}


def calls(gm: torch.fx.GraphModule) -> Counter[str]:
    """Count the operators that a graph calls: "view" those of `VIEWS`, "work" the others. Integer arithmetic does not count."""
    found = [node for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    names = [
        n.target._schema.name.removeprefix("aten::") for n in found if not isinstance(n.meta["val"], int | torch.SymInt)
    ]
    return Counter("view" if name in VIEWS else "work" for name in names)


Found = list[tuple[Counter[str], Counter[str]]]


def noting(found: Found) -> Callable[..., Any]:
    """Return the function that rewrites, which also notes a graph's counts before and after."""

    def noted(graph: torch.fx.GraphModule, *args: Any) -> Any:
        before = calls(graph)
        report = rewrite(graph, *args)
        found.append((before, calls(graph)))
        return report

    return noted


def counting(found: Found) -> Callable[..., Any]:
    """Return a backend that notes the counts of each graph and runs the graph as it is."""

    def spy(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        noting(found)(retrace(gm, inputs), REWRITES, True)
        return gm.forward

    return spy


def counting_rewritten(found: Found) -> Callable[..., Any]:
    """Return the backend llmrt, strict, which also notes the counts of each graph."""

    def spy(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        with patch.object(sys.modules[llmrt_backend.__module__], "rewrite", noting(found)):
            return llmrt_backend(gm, inputs, options={"strict": True})

    return spy


def mark_lengths(decoding: Decoding, kind: str) -> None:
    """Make the lengths of a dynamic cache symbols, as they are from the second step on."""
    if kind == "dynamic":
        for layer in getattr(decoding.cache, "self_attention_cache", decoding.cache).layers:
            torch._dynamo.maybe_mark_dynamic(layer.keys, 2)
            torch._dynamo.maybe_mark_dynamic(layer.values, 2)


def prompt_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the tokens of a decoding's first forward."""
    return batch["input_ids"][:, :4] if model.config.is_encoder_decoder else batch["input_ids"]


def decode_calls(name: str, kind: str, layers: int) -> tuple[Counter[str], Counter[str]]:
    """Return the counts of a decode step's graph before and after the rewrites."""
    found: Found = []
    torch._dynamo.reset()
    batch = padded_batch(2, 10)
    model = small_model(name, layers, torch.bfloat16)
    decoding = Decoding(model, kind, model, batch)
    decoding(prompt_of(model, batch))
    decoding.run = torch.compile(model, backend=counting(found), fullgraph=True)
    mark_lengths(decoding, kind)
    decoding(torch.full((2, 1), 7))
    assert len(found) == 1
    return found[0]


def row(name: str, kind: str, known: dict[int, tuple[Counter[str], Counter[str]]] | None = None) -> list[str]:
    """Return the table's line of a family and a kind of cache.

    Args:
        name: of the family.
        kind: of the cache.
        known: number of layers -> what `decode_calls` would return.
    """
    if (name, kind) in NO_FULLGRAPH:
        return [name, kind, "more than one graph", "", "", ""]
    few, known = LAYERS.get(name, 1), known or {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = [known.get(layers) or decode_calls(name, kind, layers) for layers in (few, few + 1)]
    cells = [more[key] - less[key] for less, more in zip(*pair, strict=True) for key in ("work", "view")]
    return [name, kind, *map(str, cells)]


def text() -> str:
    """Return what stands between the markers."""
    header = ["family", "cache", "operators before", "views before", "operators after", "views after"]
    return table(header, [row(name, kind) for name in FAMILIES for kind in CACHES])


def written() -> str:
    """Return what the file has between the markers."""
    return (ROOT / README).read_text().split(BEGIN)[1].split(END)[0]


def main() -> None:
    """Print the table, or write it into its file."""
    made = text()
    if sys.argv[1:] == ["--write"]:
        before, rest = (ROOT / README).read_text().split(BEGIN)
        (ROOT / README).write_text(before + BEGIN + made + END + rest.split(END)[1])
    elif sys.argv[1:]:
        raise SystemExit(__doc__)
    else:
        print(made, end="")


if __name__ == "__main__":
    main()
