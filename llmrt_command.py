"""Starts the command ``llmrt``: help, completion and mistakes in the arguments do not wait for torch.

Importing llmrt imports torch, since it registers operators. So this stands beside the package, and its modules of the command line are
imported while the package and its room llm are still empty; they are filled when a command runs.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from importlib.util import find_spec, module_from_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

#: What the modules of the command line are in.
PACKAGES = ("llmrt", "llmrt.llm")


def main() -> None:
    """Run the command line with the process's arguments."""
    for name in PACKAGES:
        _add_empty(name)
    from llmrt.llm.cli import app

    for command in _commands(app):
        if command.callback is not None:
            command.callback = _in_filled_packages(command.callback)
    app()


def _add_empty(name: str) -> None:
    spec = find_spec(name)
    if spec is None:
        raise ImportError(f"the package {name} is not beside {__file__}")
    sys.modules[name] = module_from_spec(spec)
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, sys.modules[name])


def _commands(app: "typer.Typer") -> "Iterator[typer.models.CommandInfo]":
    yield from app.registered_commands
    for group in app.registered_groups:
        if group.typer_instance is not None:
            yield from _commands(group.typer_instance)


def _in_filled_packages(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # its signature says which options there are
    def run(*args: Any, **kwargs: Any) -> Any:
        for name in PACKAGES:
            importlib.reload(sys.modules[name])
        return function(*args, **kwargs)

    return run
