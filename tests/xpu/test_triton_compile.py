"""Every kernel compiles for a GPU that is not there, without spilled registers; and what the interpreter is mended for."""

import json
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from llmrt.xpu.triton import launch
from llmrt.xpu.triton.blocks import Blocks

PROGRAM = """
import json
from llmrt.xpu.triton.compile_ahead import compile_all, covering
print(json.dumps([vars(row) for row in compile_all(covering())]))
"""
KERNELS = {"_norm", "_gated", "_largest", "_position", "_rope", "_rope_append", "_kv_append", "_round_rows", "_vector"}
KERNELS |= {"_matmul", "_join", "_attention", "_merge", "_permute", "_weigh", "_static_matmul", "_static_join"}
#: Products of float32 hold a whole head in registers, and these are converted on the way into them.
SPILLING = {"attention: 512 tokens, D 256, float16, other cache"}


def test_every_kernel_compiles_without_spilling(tmp_path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert {row["kernel"] for row in rows} == KERNELS
    assert {row["case"] for row in rows if row["stack"]} <= SPILLING


@triton.jit
def _products(a, b, c, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x, y = (tl.load(p + i * N + j).to(tl.bfloat16) for p in (a, b))
    tl.store(c + i * N + j, tl.dot(x, y))


def test_the_interpreter_knows_bfloat16(device: str) -> None:
    a, b, c = torch.randn(16, 16), torch.randn(16, 16), torch.empty(16, 16)
    a[0, 0] = 3.3895e38  # rounds to a number, where one more would be infinity
    b[0] = 0
    _products[(1,)](*(t.to(device) for t in (a, b)), c := c.to(device), N=16)
    torch.testing.assert_close(c.cpu(), a.bfloat16().float() @ b.bfloat16().float())


def test_autotuning_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMRT_TRITON_AUTOTUNE", raising=False)
    assert not launch.autotuned()
    monkeypatch.setenv("LLMRT_TRITON_AUTOTUNE", "1")
    assert launch.autotuned()
    monkeypatch.setenv("LLMRT_TRITON_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="LLMRT_TRITON_AUTOTUNE is 'yes'; valid: 0, 1"):
        launch.autotuned()


def test_autotuning_times_each_choice_once_per_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the clock replaced: the second choice is the fastest; an interpreted kernel would not be timed at all."""
    monkeypatch.setenv("LLMRT_TRITON_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_fastest", {})
    timed: list[Blocks] = []
    monkeypatch.setattr(launch, "_time", lambda start, choices: timed.extend(choices) or choices[1])
    started = []

    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid):
            return lambda *args, **options: started.append((grid, options["N"]))

    choices = (Blocks({"N": 1}), Blocks({"N": 2}))
    for shape in ((5,), (5,), (6,)):
        launch.launch(Kernel(), choices, lambda b: (b.sizes["N"],), shape, torch.zeros(1))
    assert started == [((2,), 2)] * 3 and timed == [*choices, *choices]
