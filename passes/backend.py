"""The compile backend ``torch.compile(model, backend="llmrt")``, found by name through the package's entry point."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .executor import compile_graph
from .folding import FoldedGraph, lift_folds
from .nodes import val
from .order import REWRITES, chosen, rewrite
from .retrace import retrace
from .rewrite import RewriteReport

#: The modes that ``torch.compile`` documents. transformers' CompileConfig passes "reduce-overhead" to any backend.
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

#: What runs the rewritten graph.
CODEGENS = ("eager", "inductor")

#: Names that ``options=`` may hold.
OPTIONS = ("codegen", "passes", "report", "strict")


def llmrt_backend(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite a captured graph to llmrt's operators and return the callable that runs it.

    Args:
        gm: graph that Dynamo captured.
        example_inputs: its inputs, fake or real.
        mode: as given to ``torch.compile``; handed to inductor when that is the codegen, else without effect.
        options: "codegen": "eager" (default: the rewritten graph runs as it is, without a compiler) or "inductor" (the rewritten
            graph is compiled by inductor); "passes": names of the rewrites to apply, default all of `REWRITES`; "report": True
            prints what was rewritten and what nearly was, a list gets the `RewriteReport` of every graph; "strict": a rewrite that
            fails raises instead of being left out with a warning.

    Raises:
        ValueError: an unknown mode, option or value.
    """
    settings = check_options(mode, options)
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        warnings.warn(
            "llmrt: gradients are recorded, so the graph runs as it was captured; "
            "call the model under torch.inference_mode() or torch.no_grad()",
            stacklevel=2,
        )
        return _run(gm, example_inputs, settings["codegen"], mode)
    traced = retrace(gm, example_inputs)
    report = rewrite(traced, settings["passes"], settings["strict"])
    _tell(report, settings["report"])
    folds = lift_folds(traced)
    if not folds:
        return _run(traced, example_inputs, settings["codegen"], mode)
    constants = [val(node) for node in traced.graph.find_nodes(op="placeholder")[len(example_inputs) :]]
    run = _run(traced, [*example_inputs, *constants], settings["codegen"], mode)
    return FoldedGraph(run, gm.forward, folds, traced.graph, example_inputs)


def check_options(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return every option with its value or default, "passes" as rewrites.

    Raises:
        ValueError: an unknown mode, option or value; the message names it and what would be valid.
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode={mode!r}: the llmrt backend knows {', '.join(MODES)}")
    given = dict(options or {})
    if unknown := sorted(set(given) - set(OPTIONS)):
        raise ValueError(f"options={unknown}: unknown to the llmrt backend (known options: {', '.join(OPTIONS)})")
    codegen = given.get("codegen", "eager")
    if codegen not in CODEGENS:
        raise ValueError(f"options['codegen']={codegen!r}; valid: {', '.join(CODEGENS)}")
    report = given.get("report", False)
    if not isinstance(report, (bool, list)):
        raise ValueError(f"options['report']={report!r}; valid: True, False or a list that gets the reports")
    strict = given.get("strict", False)
    if not isinstance(strict, bool):
        raise ValueError(f"options['strict']={strict!r}; valid: True or False")
    passes = given.get("passes")
    return {
        "codegen": codegen,
        "report": report,
        "strict": strict,
        "passes": REWRITES if passes is None else chosen(passes),
    }


def _tell(report: RewriteReport, where: bool | list[RewriteReport]) -> None:
    if isinstance(where, list):
        where.append(report)
    elif where:
        print(f"llmrt: {report}", file=sys.stderr)


def _run(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], codegen: str, mode: str | None) -> Callable[..., Any]:
    if codegen == "eager":
        return compile_graph(gm)
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode) if mode not in (None, "default") else None
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled
