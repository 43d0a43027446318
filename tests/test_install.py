"""What an installation contains: built as setuptools builds a wheel, without compiling."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files but the compiled library."""
    out = tmp_path_factory.mktemp("build")
    subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(out)], cwd=ROOT, check=True)
    return out


def test_rooms_are_packages_below_one_name(tree: Path) -> None:
    assert {entry.name for entry in tree.iterdir()} == {"llmrt", "llmrt_command.py"}
    for room in ("ops", "passes", "llm", "llm/commands", "llm/families", "llm/demo"):
        assert (tree / "llmrt" / room / "__init__.py").is_file(), room
    for file in (tree / "llmrt").rglob("*"):
        assert not file.is_symlink() and "__pycache__" not in file.parts, file


def test_every_module_is_there(tree: Path) -> None:
    for room in ("ops", "passes", "llm", "xpu"):
        sources = {f.relative_to(ROOT) for f in (ROOT / room).rglob("*.py")}
        assert sources == {f.relative_to(tree / "llmrt") for f in (tree / "llmrt" / room).rglob("*.py")}


def test_sycl_sources_and_the_loader_are_there(tree: Path) -> None:
    wanted = {f.name for f in (ROOT / "xpu/sycl").glob("*.?pp")}
    assert {"launcher.cpp", "element.hpp"} <= wanted
    assert wanted == {f.name for f in (tree / "llmrt/xpu/sycl").glob("*.?pp")}
    assert (tree / "llmrt/devices.py").is_file()


def test_demo_model_is_there_bit_for_bit(tree: Path) -> None:
    names = [f.name for f in (ROOT / "llm/demo/tiny-python").iterdir()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(names)
    for name in names:
        source, installed = (base / "llm/demo/tiny-python" / name for base in (ROOT, tree / "llmrt"))
        assert installed.read_bytes() == source.read_bytes()


def test_types_are_there(tree: Path) -> None:
    assert (tree / "llmrt/py.typed").is_file() and (tree / "llmrt/_C.pyi").is_file()


def test_an_isolated_build_is_not_offered_torch() -> None:
    """pip would fetch a torch of several GB for it."""
    requires = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert requires and "setuptools" in requires[1] and "torch" not in requires[1]
