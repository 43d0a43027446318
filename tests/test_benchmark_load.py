"""benchmarks/load.py on a tiny shape: every way answers, and the files are those that the next run takes."""

import json
import subprocess
import sys
from pathlib import Path

LOAD = Path(__file__).resolve().parents[1] / "benchmarks/load.py"


def test_every_way_reports(tmp_path: Path) -> None:
    command = [sys.executable, str(LOAD), "--shape", "tiny", "--rounds", "1", "--threads", "1", "--group-size", "32"]
    command += ["--directory", str(tmp_path / "models"), "--out", str(tmp_path / "out"), "--cold"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    record = json.loads((tmp_path / "out/load-tiny.json").read_text())
    assert done.stdout == (tmp_path / "out/load-tiny.txt").read_text()
    assert set(record["ways"]) == {"load and optimize", "quantize on load", "reload quantized", "load GPTQ"}
    for way, (seen,) in record["ways"].items():
        assert way in done.stdout
        assert seen["load_s"] > 0 and seen["first_token_s"] > 0 and seen["peak_bytes"] >= seen["before_bytes"] > 0
    assert record["made"]["weight_bytes"] > 0 and record["made"]["seconds"]["save quantized"] > 0
    assert (tmp_path / "models/quantized/model.safetensors").is_file()
