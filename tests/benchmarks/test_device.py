"""Whole models on one device: on the CPU everything runs; where a device is missing it says so."""

import json
from types import SimpleNamespace

import pytest
import torch

from llmrt.ops.formats import FORMATS


@pytest.fixture
def program(load):
    return load("device.py")


def test_models_take_turns_on_the_cpu(program, tmp_path, capsys):
    options = ["--device=cpu", "--shape=tiny", "--ours=int4,bf16", "--group-size=32", "-p", "6", "-n", "3"]
    program.main([*options, "--rounds=2", f"--json={tmp_path / 'out.json'}"])
    seen = json.loads((tmp_path / "out.json").read_text())
    rival, *ours = seen["rows"]
    assert rival["model"] == program.RIVAL and rival["x decode"] == rival["x prefill"] == 1
    assert [row["model"] for row in ours] == ["llmrt int4", "llmrt bf16"]
    assert ours[0]["weights GB"] < ours[1]["weights GB"] == rival["weights GB"]
    for row in seen["rows"]:
        assert row["GB/s"] == pytest.approx(row["weights GB"] * row["decode tok/s"])
        assert row["% of a copy"] == pytest.approx(100 * 1e9 * row["GB/s"] / seen["bytes_per_second"])
    for runs in seen["rounds"].values():
        assert len(runs) == 2 and all(run["first_token_ms"] > 0 and len(run["next_token_ms"]) == 2 for run in runs)
    assert seen["workload"]["prompt"] == 6 and seen["references"] == []
    assert "llmrt int4" in capsys.readouterr().out


def test_rounds_rotate_and_the_first_is_not_measured(program):
    order = []
    runs = {name: SimpleNamespace(run=lambda name=name: order.append(name) or len(order)) for name in "abc"}
    timings = program.alternate(runs, 2)
    assert "".join(order) == "abc" + "bca" + "cab"
    assert timings == {"a": [6, 8], "b": [4, 9], "c": [5, 7]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device=tpu"], "device is 'tpu'; valid: 'cpu', 'xpu', 'cuda'"),
        (["--device=cpu", "--ours=int4,int5"], "--ours has int5; valid: bf16, int4"),
        (["--device=cpu", "--shape=tiny", "-p", "2000"], "the model's maximum is 1024"),
        (["--device=cpu", "--shape=large"], "large"),
        (["--device=cpu", "--rounds=0"], "--rounds is 0"),
    ],
)
def test_bad_options(options, message, program, capsys):
    with pytest.raises(SystemExit):
        program.parse(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_device_that_is_not_there(kind, program, capsys):
    if getattr(torch, kind).is_available():
        pytest.skip(f"there is a device {kind}")
    with pytest.raises(SystemExit):
        program.parse([f"--device={kind}"])
    message = capsys.readouterr().err
    assert f"device is '{kind}', but " in message and ("is built without" in message or "no such device" in message)


def test_every_format_has_settings(program):
    for name in FORMATS:
        made = program.settings(name, 32)
        assert made.quantization().weight_dtype == name and made.optimize
    assert not program.settings(program.RIVAL, 32).optimize and program.settings("bf16", 32).optimize
