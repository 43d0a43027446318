"""The command ``llmrt``."""

from __future__ import annotations

from typing import Annotated

import typer

from .bench import bench
from .commands.chat import chat
from .commands.convert import convert
from .commands.doctor import doctor
from .commands.generate import generate
from .commands.perplexity import perplexity
from .commands.quantize import quantize
from .commands.xpu import app as xpu

app = typer.Typer(name="llmrt", no_args_is_help=True, pretty_exceptions_show_locals=False)
for command in (generate, chat, perplexity, quantize, convert, bench, doctor):
    app.command()(command)
app.add_typer(xpu)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ..version import __version__

        typer.echo(f"llmrt {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fast inference of Hugging Face language models on x86 CPUs.

    Example: llmrt generate "def parse_args("
    """


if __name__ == "__main__":
    app()
