"""Programs of benchmarks/ as modules. No test of this folder looks at a timing."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def folder() -> Path:
    """Where the programs are."""
    return BENCHMARKS


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a program, by its path in benchmarks, as `python benchmarks/...` does: with its folder on the path."""

    def load(path: str) -> ModuleType:
        monkeypatch.syspath_prepend(str((BENCHMARKS / path).parent))
        name = Path(path).stem
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / path)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, loaded)
        spec.loader.exec_module(loaded)
        return loaded

    return load
