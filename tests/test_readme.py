"""The README is true: its commands are those that CI runs, its Python runs, its table is what the tests exercise."""

import importlib
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from llmrt.llm.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(marker: str) -> str:
    """Return the fenced block below a marker."""
    match = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```\n", README, re.DOTALL)
    assert match, marker
    return match[1]


@pytest.mark.parametrize("name", ["run", "test"])
def test_commands_are_one_line_that_ci_reads_from_here(name: str) -> None:
    command, script = block(f"command: {name}"), (ROOT / ".ci/run").read_text()
    assert command.count("\n") == 1 and "torch==" in command and "--no-build-isolation" in command
    assert f"readme_command {name}" in script and command.strip() not in script
    torch_wanted = set(re.findall(r"torch==[\d.]+", README + script))
    assert len(torch_wanted) == 1


def test_ci_finds_the_commands() -> None:
    function = re.search(r"^readme_command\(\) \{.*?^\}$", (ROOT / ".ci/run").read_text(), re.DOTALL | re.MULTILINE)
    assert function
    for name in ("run", "test"):
        script = f"{function[0]}\nreadme_command {name}"
        found = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert found == block(f"command: {name}")


INSTALLED = "llmrt" in entry_points(group="torch_dynamo_backends").names
NEEDS_ENTRY_POINT = pytest.mark.skipif(not INSTALLED, reason="llmrt is not installed, only importable")


@pytest.mark.parametrize(
    "example", ["python", "checkpoint", "static", pytest.param("compile", marks=NEEDS_ENTRY_POINT)]
)
def test_the_python_examples_run(example: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    code = block(f"example: {example}")
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "def main(" in result.stdout, result.stderr


def test_the_export_example_continues_as_generate_does(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    code = block("example: export") + (
        "prompt = AutoTokenizer.from_pretrained(path)('def main(', return_tensors='pt')\n"
        "print(*model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt['input_ids'].shape[1]:].tolist())\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *tokens, generated = result.stdout.splitlines()
    assert len(tokens) == 20 and tokens == generated.split() and (tmp_path / "model.pt2").is_file()


def test_commands_are_those_that_exist() -> None:
    listed = set(re.findall(r"^\| `llmrt (\w+)", README, re.MULTILINE))
    groups = {group.typer_instance.info.name for group in app.registered_groups if group.typer_instance}
    assert listed == {info.callback.__name__ for info in app.registered_commands if info.callback} | groups


def test_environment_variables_are_those_that_are_read() -> None:
    listed = set(re.findall(r"^\| `(LLMRT_\w+)`", README, re.MULTILINE))
    sources = [f for folder in ("csrc", "ops", "passes", "llm", "xpu") for f in (ROOT / folder).rglob("*.*")]
    text = "".join(f.read_text() for f in (*sources, ROOT / "setup.py") if f.suffix in (".py", ".cpp", ".h"))
    asked = r"""(?:getenv\(|environ\.get\(|environ\[|ASKED_BY = )["'](LLMRT_\w+)"""
    assert listed == set(re.findall(asked, text))


def test_support_table_is_what_the_tests_exercise(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If not: python -m tests.support_table --write"""
    monkeypatch.syspath_prepend(str(ROOT))
    support_table = importlib.import_module("tests.support_table")
    config, option = request.config, request.config.option
    whole = any(
        (ROOT / "tests/llm").is_relative_to((config.invocation_params.dir / name).resolve()) for name in config.args
    )
    if whole and not (option.keyword or option.markexpr or option.deselect):
        collector = support_table.Collector()
        collector.note(request.session.items)
        made = support_table.text(collector)
    else:  # this run has not collected what the table is made of
        command = [sys.executable, "-m", "tests.support_table"]
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    written = README.split("<!-- support table: begin -->\n")[1].split("<!-- support table: end -->\n")[0]
    assert written == made
