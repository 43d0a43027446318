"""benchmarks/load.py on a tiny shape: every way answers, and the files are those that the next run takes."""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.utils import logging

#: The way that gets a process of its own, as all do outside of tests: the start of one takes longer than what is tested here.
APART = "load GPTQ"


@pytest.fixture
def one_process(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Run the workers but one here; the value is the ways that ran."""
    load("workers/protocol.py")
    worker, start, ways = load("workers/load_model.py"), subprocess.run, []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[:2] == [sys.executable, worker.__file__]
        ways.append(command[2])
        if command[2] == APART:
            return start(command, **options)
        with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.setattr(sys, "argv", command[1:])
            worker.main()
        return subprocess.CompletedProcess(command, 0, printed.getvalue())

    monkeypatch.setattr(subprocess, "run", run)
    threads = torch.get_num_threads()
    yield ways
    torch.set_num_threads(threads)
    logging.enable_progress_bar()


def test_every_way_reports(
    load: Callable[[str], ModuleType], one_process: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = load("load.py")
    options = ["--shape", "tiny", "--rounds", "1", "--threads", "1", "--group-size", "32", "--cold"]
    program.main([*options, "--directory", str(tmp_path / "models"), "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out/load-tiny.json").read_text())
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out/load-tiny.txt").read_text()
    assert one_process == ["make", *program.WAYS]
    assert set(record["ways"]) == {"load and optimize", "quantize on load", "reload quantized", "load GPTQ"}
    for way, (seen,) in record["ways"].items():
        assert way in printed
        assert seen["load_s"] > 0 and seen["first_token_s"] > 0 and seen["peak_bytes"] >= seen["before_bytes"] > 0
    assert record["made"]["weight_bytes"] > 0 and record["made"]["seconds"]["save quantized"] > 0
    assert (tmp_path / "models/quantized/model.safetensors").is_file()
    assert program.measure(program.parse([*options, "--rounds", "0"]), tmp_path / "models")["made"] == record["made"]
