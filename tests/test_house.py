"""The house's rules: which room may import what, one stem everywhere, small files, no model name outside llm/families."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmrt.llm.families
from llmrt.ops import OPERATORS

ROOT = Path(__file__).parent.parent
ROOMS = {  # room -> rooms and packages it may import, beside itself, the standard library and llmrt._C
    "ops": {"torch"},
    "xpu": {"torch", "ops", "triton"},
    "passes": {"torch", "ops"},
    "llm": {
        "torch",
        "ops",
        "passes",
        "transformers",
        "safetensors",
        "accelerate",
        "gguf",
        "tokenizers",
        "typer",
        "rich",
        "psutil",
    },
}
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
NATIVE = sorted(path for pattern in ("*.h", "*.cpp") for path in (ROOT / "csrc").rglob(pattern))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
#: Families by their first word, as a part of any name: opt and phi are also parts of English words.
MODEL_NAME = re.compile(
    r"llama|mistral|qwen|gemma|starcoder|bigcode|neox|\bphi-?\d|\bglm|\bopt\b|falcon|\bbloom", re.IGNORECASE
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, first part) of what a file imports; for relative imports the part below llmrt."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, str(node.module).partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            target = (*base, *str(node.module or "").split(".")) if node.module else base
            names = [target[0]] if target else [alias.name for alias in node.names]
            yield from ((node.lineno, part) for part in names)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_down_only(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    allowed = (
        ROOMS[room] | {room, "_C", "version", *({"devices"} if room == "llm" else ())} | set(sys.stdlib_module_names)
    )
    wrong = [f"{name(path)}:{line} imports {part}" for line, part in imports(path) if part not in allowed]
    assert not wrong, "\n".join(wrong)


def test_the_import_test_sees_imports() -> None:
    seen = {part for _, part in imports(ROOT / "llm/linear.py")}
    assert {"ops", "torch", "typing"} <= seen
    assert {part for _, part in imports(ROOT / "llm/checkpoints/native.py")} >= {"llm", "transformers"}


def test_rooms_are_linked_into_the_package() -> None:
    for room in ROOMS:
        link = ROOT / "llmrt" / room
        assert link.is_symlink() and link.readlink() == Path("..") / room


def test_one_stem_for_every_operator() -> None:
    for operator in OPERATORS.values():
        stem = operator.reference.__module__.rpartition(".")[2]
        for expected in (f"ops/{stem}.py", f"csrc/{stem}.cpp", f"csrc/{stem}.h", f"tests/ops/test_{stem}.py"):
            if expected != "csrc/rope_append.h":  # it calls the kernels of rope
                assert (ROOT / expected).is_file(), f"{operator.name} is in ops/{stem}.py, but there is no {expected}"


@pytest.mark.parametrize("path", [*SOURCES, *NATIVE, *TESTS, *BENCHMARKS], ids=name)
def test_files_are_small_and_named_for_what_they_hold(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    limit = 300 if path in TESTS else 500
    assert lines <= limit, f"{name(path)} has {lines} lines; at most {limit}"
    assert not re.search(r"util|common|helper|misc|_v2|_new", path.stem), name(path)


def code_words(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of names and strings; docstrings may name a model, as the source of a formula or an example."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body
        and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value
        for field in ("id", "attr", "name", "arg"):
            text = getattr(node, field, None)
            if isinstance(text, str):
                yield getattr(node, "lineno", 0), text


def test_model_names_stand_in_families_only() -> None:
    elsewhere = [p for p in SOURCES if not name(p).startswith(("llm/families", "llm/demo"))]
    wrong = [
        f"{name(p)}:{line}: {text[:60]}" for p in elsewhere for line, text in code_words(p) if MODEL_NAME.search(text)
    ]
    for path in NATIVE:
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        wrong += [f"{name(path)}: {word}" for word in MODEL_NAME.findall(code)]
    assert not wrong, "\n".join(wrong)
    rows = "\n".join(text for _, text in code_words(ROOT / "llm/families/rows.py"))
    assert len(MODEL_NAME.findall(rows)) >= 10, "the pattern knows the table's names"
    assert set(llmrt.llm.families.FAMILIES) <= set(rows.split("\n"))


def test_no_path_of_a_machine() -> None:
    suffixes = {".py", ".h", ".cpp", ".toml", ".md", ".in", ".cfg", ".yaml", ".yml", ""}
    folders = [*ROOMS, "csrc", "tests", "benchmarks", "llmrt", ".ci"]
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes and p.is_file()]
    files += [p for p in ROOT.iterdir() if p.suffix in suffixes and p.is_file() and p.name != ".git"]
    pattern = re.compile("/(?:work" + "|root|home/[a-z]+)/|https?://[^/ ]*(?:pypi|registry|artifact)[^ ]*")
    wrong = [
        f"{name(p)}: {m.group()}"
        for p in files
        if p != Path(__file__)
        for m in pattern.finditer(p.read_text(errors="replace"))
    ]
    assert not wrong, "\n".join(wrong)
