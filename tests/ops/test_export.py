"""Every operator through torch.export with dynamic sizes, a file, AOTInductor, and a process that imports only llmrt and torch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_dynamic_shapes import CASES, OTHERS, TRACED, Case, outputs
from torch import Tensor, nn

from llmrt.ops import OPERATORS

ROOT = Path(__file__).parents[2]


class Calls(nn.Module):
    """Makes the calls of some cases; one tuple of inputs each."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.cases = cases

    def forward(self, inputs: list[tuple[Tensor, ...]]) -> list[Tensor]:
        results: list[Tensor] = []
        for case, own in zip(self.cases, inputs, strict=True):
            made = outputs(case.function(OPERATORS[case.name].overload, *own))
            results += made or [own[0] + 0]  # what was written is read; a program without results cannot be saved
        return results


def inputs_of(cases: list[Case], sizes: tuple[int, int, int]) -> list[tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return [tuple(x.clone() for x in case.inputs(*sizes)) for case in cases]


def export(cases: list[Case]) -> torch.export.ExportedProgram:
    shapes = [case.dynamic for case in cases]
    return torch.export.export(Calls(cases), (inputs_of(cases, TRACED),), dynamic_shapes=(shapes,), strict=False)


def cases_of(name: str) -> list[Case]:
    cases = [case for case in CASES if case.name == name]
    assert cases, f"{name} has no case in test_dynamic_shapes.py"
    return cases


@pytest.mark.parametrize("name", OPERATORS)
def test_an_exported_operator_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    cases = cases_of(name)
    torch.export.save(export(cases), tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for sizes in OTHERS:
        inputs, expected_inputs = inputs_of(cases, sizes), inputs_of(cases, sizes)
        expected = Calls(cases)(expected_inputs)
        torch.testing.assert_close([loaded(inputs), inputs], [expected, expected_inputs], rtol=0, atol=0)


#: What a process does that knows nothing but the files; argv: folder, module imported first.
FRESH = """
import importlib, sys
folder, first = sys.argv[1:]
importlib.import_module(first)
import llmrt, torch
assert "transformers" not in sys.modules
loaded = {"aoti": torch._inductor.aoti_load_package(f"{folder}/aoti.pt2")}
if first == "llmrt":
    loaded["program"] = torch.export.load(f"{folder}/program.pt2").module()
for name, run in loaded.items():
    for inputs, expected, expected_inputs in torch.load(f"{folder}/calls.pt"):
        result = run(inputs)
        torch.testing.assert_close([result, inputs], [expected, expected_inputs], rtol=1e-6, atol=1e-6)
    print(name, "equal")
"""


#: A package whose host code nobody runs twice: compiling it is most of the time.
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any) -> Path:
    """Return a folder with all operators in one program, in one AOTInductor package, and calls with their results."""
    folder, cases = tmp_path_factory.mktemp("export"), list(CASES)
    assert {case.name for case in cases} == set(OPERATORS)
    program, calls = export(cases), []
    for sizes in OTHERS:
        inputs, expected_inputs = inputs_of(cases, sizes), inputs_of(cases, sizes)
        calls.append((inputs, Calls(cases)(expected_inputs), expected_inputs))
    torch.save(calls, folder / "calls.pt")
    torch.export.save(program, folder / "program.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "aoti.pt2"), inductor_configs=QUICK)
    return folder


@pytest.mark.xdist_group("aoti")
@pytest.mark.parametrize("first", ["llmrt", "torch"])
def test_a_process_that_imports_llmrt_runs_all_operators(first: str, files: Path) -> None:
    command = [sys.executable, "-c", FRESH, str(files), first]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == (["aoti", "equal", "program", "equal"] if first == "llmrt" else ["aoti", "equal"])
