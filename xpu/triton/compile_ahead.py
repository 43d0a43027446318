"""Compiles every kernel for an NVIDIA GPU without one: ``python -m llmrt.xpu.triton.compile_ahead``.

The interpreter accepts Python that the compiler does not. Here the routes are called with tensors of real models' shapes, each launch is
compiled for compute capability 9.0 with the ptxas of the triton package, and nothing runs. Prints registers, stack (spilled registers) and
shared memory of each.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ...ops.formats import Layout
from ..route import ROUTES, import_routes
from .interpreter import INTERPRETED

TARGET = GPUTarget("cuda", 90, 32)
T = TypeVar("T")
#: What one program may take of the shared memory of an H100.
SHARED = 227 << 10


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel.

    Args:
        case: what the operator was called with.
        kernel: its name.
        warps: of 32 threads.
        registers: of a thread.
        stack: bytes of a thread that lie in memory; above 0 where registers are spilled.
        shared: bytes of a program.
    """

    case: str
    kernel: str
    warps: int
    registers: int
    stack: int
    shared: int


class _Driver:
    """A driver of a GPU that is not there, for the compiler's questions."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _resources(kernel: Any) -> tuple[int, int]:
    """Return registers and bytes of stack of one thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text}")
    return int(found[1]), int(found[2])


def _packed(n: int, k: int, layout: str, *first: int) -> Tensor:
    """Return bytes of the size of a packed weight; they are never read."""
    sizes = Layout.parse(layout).geometry(k)
    return torch.empty((*first, n // 32, sizes.tiles, sizes.tile_bytes), dtype=torch.uint8)


def _linear(m: int, layout: str, compute: str, epilogue: str = "none", dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a call of quant_linear with a 4096 x 4096 weight; with a 1024 x 4096 one for float32, whose inputs are shared then."""
    n = 1024 if dtype == torch.float32 else 4096
    weight, gated = _packed(n, 4096, layout), epilogue.endswith("_mul")
    out = n // 2 if gated else n
    bias, x = torch.empty(n, dtype=dtype) if m > 1 else None, torch.empty((m, 4096), dtype=dtype)
    other = torch.empty((m, out), dtype=dtype) if epilogue in ("add", "mul") else None
    return f"{m} rows, {layout}, {compute}, {epilogue}", (x, weight, bias, other, layout, out, compute, epilogue)


def _linear_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for m in (1, 16, 512):
        yield _linear(m, "int4_sym_g128_bf16", "int8")
        yield _linear(m, "int4_asym_g32_f16", "bf16", "silu_mul")
    yield _linear(1, "int8_asym_g64_f32", "int8", "silu_mul")
    yield _linear(512, "int8_asym_channel_f32", "int8", "gelu")
    yield _linear(512, "int8_sym_g64_f32", "fp16", "gelu_tanh_mul", torch.float16)
    yield _linear(1, "nf4_sym_g100_f32", "int8", "add")
    yield _linear(512, "nf4_sym_g64_bf16", "bf16", "mul")
    yield _linear(16, "nf4_sym_g64_bf16", "int8", "relu", torch.float32)
    yield _linear(512, "fp4_e2m1_sym_g32_bf16", "fp32", "silu", torch.float32)
    yield _linear(16, "fp8_e4m3_sym_channel_f32", "fp32", "none", torch.float32)
    yield _linear(1, "fp8_e4m3_sym_g32_e8m0", "bf16", "gelu_tanh")
    yield _linear(512, "fp8_e4m3_sym_channel_f32", "bf16", "gelu_mul")
    yield _linear(512, "fp8_e5m2_sym_g100_e8m0", "fp16")


def _expert_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield calls of experts of 4096 x 1024: of few tokens, whose pairs run alone, and of many, which are put in order."""

    def call(
        tokens: int,
        experts: int,
        layout: str,
        compute: str,
        down: str,
        down_compute: str,
        dtype: torch.dtype,
        permuted: bool,
    ) -> Any:
        x, indices = torch.empty(tokens, 4096, dtype=dtype), torch.zeros(tokens, 2, dtype=torch.int64)
        scores = torch.empty(tokens, 2, dtype=torch.float32 if permuted else dtype)
        weights = (_packed(2048, 4096, layout, experts), _packed(4096, 1024, down, experts))
        perms = [torch.zeros(experts, n, dtype=torch.int32) if permuted else None for n in (4096, 1024)]
        args = (x, indices, scores, *weights, *perms, layout, down, 1024, compute, down_compute, "silu")
        return f"{tokens} tokens, {layout}, {compute}, {down}, {down_compute}{', permuted' * permuted}", args

    int4, int8, bf16 = "int4_sym_g128_bf16", "int8_asym_g64_f32", torch.bfloat16
    for tokens, experts in ((1, 8), (64, 128), (512, 8)):
        yield call(tokens, experts, int4, "int8", int4, "int8", bf16, False)
        yield call(tokens, experts, int8, "int8", "nf4_sym_g64_bf16", "bf16", torch.float16, True)
    yield call(512, 128, "fp8_e4m3_sym_channel_f32", "bf16", int4, "fp32", bf16, False)
    yield call(512, 128, "nf4_sym_g64_bf16", "fp32", int8, "fp16", torch.float32, False)


def _static_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    layout = "int8_sym_channel_f32"
    for m, epilogue, dtype in (
        *((1, "none", torch.bfloat16), (16, "silu_mul", torch.bfloat16), (1, "gelu_mul", torch.float16)),
        *((512, "none", torch.bfloat16), (512, "gelu_tanh_mul", torch.float32), (512, "add", torch.float16)),
    ):
        out = 2048 if epilogue.endswith("_mul") else 4096
        bias, factors = (torch.empty(4096), torch.ones(4096)) if out == 2048 else (None, None)
        other = torch.empty(m, out, dtype=dtype) if epilogue == "add" else None
        weight, sums = _packed(4096, 4096, layout), torch.zeros(4096, dtype=torch.int32)
        x = torch.empty(m, 4096, dtype=dtype)
        yield f"{m} rows, {epilogue}", (x, weight, sums, bias, other, factors, 0.1, 100, layout, out, epilogue)


def _attention_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    def call(name: str, tokens: int, width: int, dtype: torch.dtype, cache: torch.dtype, **options: Any) -> Any:
        stored = width + 4 if cache == torch.int8 else width
        key, value = (torch.empty((2, 8, 1024, stored), dtype=cache) for _ in range(2))
        query = torch.empty((2, tokens, 32, width), dtype=dtype)
        full = {"causal": True, "window": 0, "softcap": 0.0, "mask": None, "slopes": None, "sinks": None, "rows": None}
        return f"{tokens} tokens, D {width}, {str(cache)[6:]}, {name}", (
            *(query, key, value, 1000, 0.1),
            *(full | options).values(),
        )

    bf16, f16, f32, int8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
    for width in (64, 128, 256):
        yield call("causal", 512, width, bf16, bf16)
    yield call("one token", 1, 128, bf16, bf16)
    yield call("one token, indirect, int8", 1, 80, f16, int8, rows=torch.zeros(2, 1000, dtype=torch.int32))
    yield call("window, softcap, sinks", 512, 128, bf16, int8, window=256, softcap=30.0, sinks=torch.zeros(32))
    yield call("bool mask", 512, 96, f16, f16, mask=torch.ones(2, 1000, dtype=torch.bool), causal=False)
    bias = torch.zeros(1, 1, 512, 1000, dtype=bf16)
    yield call("float mask, slopes", 512, 128, bf16, bf16, mask=bias, slopes=torch.zeros(32))
    for width in (128, 256):
        yield call("other cache", 512, width, bf16, f16)
    yield call("float32", 512, 128, f32, f32)
    bias = torch.zeros(2, 1, 1, 1000)
    everything = {"window": 256, "softcap": 30.0, "mask": bias, "slopes": torch.zeros(32), "sinks": torch.zeros(32)}
    yield call("everything", 512, 256, bf16, int8, **everything)
    yield call("everything, indirect", 1, 128, bf16, int8, rows=torch.zeros(2, 1000, dtype=torch.int32), **everything)
    yield call("everything, float32", 512, 128, f32, f32, **everything)


def _row_calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    bf16 = torch.bfloat16
    x, weight = torch.empty(512, 4096, dtype=bf16), torch.empty(4096, dtype=bf16)
    yield "rms_norm", "4096", (x, weight, 1e-5)
    yield "add_rms_norm", "4096, float32", (x.float(), x.float(), weight, 1e-5, 1.0)
    yield "layer_norm", "30000", (torch.empty(8, 30000), torch.empty(30000), torch.empty(30000), 1e-5)
    yield "add_layer_norm", "4096, no weight", (x, x, None, None, 1e-5)
    yield "silu_mul", "halves", (x[:, :2048], x[:, 2048:])
    for approximate in ("none", "tanh"):
        yield "gelu_mul", approximate, (x.half(), x.half(), approximate)
    yield "argmax", "128256", (torch.empty(2, 128256, dtype=bf16),)


def _head_calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    bf16, tokens = torch.bfloat16, 64
    query, key = torch.empty(2, tokens, 32, 128, dtype=bf16), torch.empty(2, tokens, 8, 128, dtype=bf16)
    cos = torch.empty(1, tokens, 128)
    table, ids = torch.empty(4096, 48, dtype=bf16), torch.zeros(1, tokens, dtype=torch.int64)
    head = torch.empty(128, dtype=bf16)
    yield "rope", "D 128", (query, key, cos, cos)
    yield "rope", "interleaved 96 of 128, table", (query, key, table, table, ids, 96, True)
    yield "rope", "norms, 96 of 128", (query, key, table, table, ids, 96, False, head, head, 1e-6)
    for dtype, width in ((bf16, 128), (torch.int8, 132)):
        caches = (torch.empty(2, 8, 256, width, dtype=dtype), torch.empty(2, 8, 256, width, dtype=dtype))
        name = str(dtype)[6:]
        yield "kv_append", name, (*caches, key, key, 3)
        yield "kv_append", f"{name}, positions", (*caches, key, key, 0, 1, torch.arange(tokens))
        yield "kv_append", f"{name}, counter", (*caches, key, key, 0, 2, None, torch.tensor(5))
        yield "rope_append", name, (query, key, key, cos, cos, *caches, 3)
        options = (table, table, *caches, 0, 1, torch.arange(tokens), ids, 96, True, head, head, 1e-6, 0.0)
        yield "rope_append", f"{name}, positions, norms", (query, key, key, *options)


def calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Yield (operator, what is special, arguments) of the calls that are compiled: every kernel, option and kind of dtype."""
    yield from _row_calls()
    yield from _head_calls()
    yield from (("quant_linear", *call) for call in _linear_calls())
    yield from (("quant_experts", *call) for call in _expert_calls())
    yield from (("static_linear", *call) for call in _static_calls())
    yield from (("attention", *call) for call in _attention_calls())


Call = tuple[str, str, tuple[Any, ...]]


def _launches(call: Call, start: Callable[..., Any]) -> None:
    """Run an operator's route with every launch replaced by `start`."""
    operator, _, args = call
    jit = triton.runtime.jit.JITFunction
    run = jit.run
    jit.run = start
    try:
        ROUTES[operator, "triton"].run(*(a.clone() if isinstance(a, Tensor) and a.dim() < 2 else a for a in args))
    finally:
        jit.run = run


def _kinds(call: Call) -> set[tuple[str, ...]]:
    """Return kernels with the values of their options, the sizes of heads and codes, and which arguments are None or int8."""
    found: set[tuple[str, ...]] = set()

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        for name, value in options.items():
            if name in ("BLOCK_D", "BITS") or isinstance(value, bool) or not isinstance(value, int):
                found.add((self.__name__, name, str(value)))
        for i, value in enumerate(args):
            if value is None or isinstance(value, Tensor):
                found.add((self.__name__, str(i), str(value is None or value.dtype == torch.int8)))

    _launches(call, note)
    return found


def cover(left: Sequence[tuple[T, set[Any]]]) -> list[T]:
    """Return few of the things that have every kind that all have: the one with the most new kinds first, and so on.

    Args:
        left: things and their kinds.
    """
    missing: set[Any] = set().union(*(kinds for _, kinds in left))
    chosen: list[T] = []
    while missing:
        thing, kinds = max(left, key=lambda pair: len(pair[1] & missing))
        chosen.append(thing)
        missing -= kinds
    return chosen


def covering() -> list[Call]:
    """Return few calls that have every kind of launch that all calls have."""
    import_routes()
    return cover([(call, _kinds(call)) for call in calls()])


def compile_all(chosen: list[Call] | None = None) -> list[Compiled]:
    """Compile the kernels of the chosen calls, or of all.

    Raises:
        RuntimeError: kernels of this process are interpreted, or one uses more shared memory than the target has.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set; kernels that are interpreted cannot be compiled")
    import_routes()
    table, run, driver = [], triton.runtime.jit.JITFunction.run, triton.runtime.driver
    for call in chosen or list(calls()):
        found: list[Any] = []

        def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            found.append(run(self, *args, grid=grid, warmup=True, **options))  # noqa: B023

        driver.set_active(_Driver())
        try:
            _launches(call, compile_only)
        finally:
            driver._active = None
        for kernel in found:
            registers, stack = _resources(kernel)
            data = kernel.metadata
            row = Compiled(f"{call[0]}: {call[1]}", data.name, data.num_warps, registers, stack, data.shared)
            if row.shared > SHARED:
                raise RuntimeError(f"{row} uses more than {SHARED} bytes of shared memory")
            table.append(row)
    return table


def main() -> None:
    """Print the table."""
    print("| call | kernel | warps | registers | stack | shared |\n| --- | --- | --- | --- | --- | --- |")
    for row in compile_all():
        cells = (row.case, row.kernel, row.warps, row.registers, row.stack, row.shared)
        print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    main()
