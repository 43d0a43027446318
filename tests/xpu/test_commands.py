"""The commands of ``llmrt xpu``."""

import json

import pytest
from typer.testing import CliRunner, Result

from llmrt.llm.cli import app
from llmrt.xpu.sycl import offline, toolchain

needs_sycl = pytest.mark.skipif(toolchain.missing() is not None, reason=str(toolchain.missing()))
needs_ocloc = pytest.mark.skipif(offline.missing() is not None, reason=str(offline.missing()))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["xpu", *arguments])


@pytest.mark.parametrize("command", ["build", "table", "routes"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert f"Example: llmrt xpu {command}" in run(command, "--help").stdout


@needs_sycl
def test_build_compiles_what_a_model_needs() -> None:
    result = run("build", "--weight-dtype", "int4", "--head-dim", "64")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split(" s  ")[1].split()[0].split("+")[0] for line in lines[:-1]] == [
        "norm",
        "linear",
        *["attention"] * 3,
    ]
    assert str(toolchain.cache_folder()) in lines[-1]


@needs_sycl
@needs_ocloc
def test_table_has_no_spills() -> None:
    result = run("table", "--gpu", "dg2", "--weight-dtype", "int4", "--head-dim", "64", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {"rms_norm", "quant_linear_row", "quant_linear_rows", "attention_rows"} <= {row["kernel"] for row in found}
    assert all(row["device"] == "dg2" and row["spilled"] == 0 for row in found)


def test_routes_names_every_operator_of_the_table() -> None:
    result = run("routes")
    assert result.exit_code == 0, result.output
    assert {"quant_linear", "attention", "dense_linear"} <= {line.split()[0] for line in result.stdout.splitlines()[1:]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "--weight-dtype", "int5"), "weight dtype is 'int5'; valid: int4"),
        (("build", "--head-dim", "300"), "256"),
        (("table", "--gpu", "h100"), "h100"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], message: str) -> None:
    if toolchain.missing() is None and offline.missing() is None:
        result = run(*arguments)
        assert result.exit_code == 2 and message in result.output


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "missing", lambda: "no SYCL here: install it")
    for command in ("build", "table"):
        result = run(command)
        assert result.exit_code == 2 and "no SYCL here" in result.output
