"""The linears of tiers that most CPUs lack: their tier files, compiled with the instructions emulated (emulated_instructions.h)."""

import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from comparing import compare_with_double
from test_operators import DTYPES

from llmrt import _C, ops
from llmrt.ops import OPERATORS, Layout
from llmrt.ops.operator import Sample

ROOT = Path(__file__).parents[2]
EMULATED = ("avx_vnni", "amx")
START = _C.cpu_isa()
pytestmark = [
    pytest.mark.skipif(START == "reference", reason="no kernels on this CPU, or LLMRT_CPU_ISA=reference"),
    pytest.mark.xdist_group("emulated"),
]


def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def base_of(tier: str) -> str:
    """Return the tier with the vectors that `tier` has, or the next lower one of this CPU."""
    bases = ("avx2",) if tier == "avx_vnni" else ("avx512_bf16", "avx512_vnni", "avx2")
    return next(base for base in bases if base in _C.cpu_isas().split(", "))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Compile the tiers side by side, add them, and return their names. Unoptimized: compiling would take longer than all calls save."""
    setup, folder = setup_script(), tmp_path_factory.mktemp("tiers")
    source = str(Path(__file__).with_name("emulated_tier.cpp"))
    jobs = []
    for tier in EMULATED:
        flags = [*setup.TIER_FLAGS, *setup.TIERS[base_of(tier)], "-O0", f"-DEMULATE_{tier.upper()}"]
        command = [setup.tier_compiler(), *flags, f"-I{ROOT / 'csrc'}", source, "-shared", "-o", f"{folder / tier}.so"]
        jobs.append((tier, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for tier, job in jobs:
        _, errors = job.communicate()
        assert job.returncode == 0, f"{tier}: {errors}"
    return {tier: _C.add_cpu_isa(f"{folder / tier}.so") for tier in EMULATED}


@pytest.fixture(params=EMULATED)
def emulated(request: pytest.FixtureRequest, built: dict[str, str]) -> Iterator[str]:
    """Run the test under an emulated tier; its value is the tier's name."""
    _C.force_cpu_isa(built[request.param])
    yield request.param
    _C.force_cpu_isa(START)


def call(x: torch.Tensor, n: int, layout: Layout, compute: str = "int8") -> Sample:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        weight = ops.quantize(torch.randn(n, x.shape[-1]) / x.shape[-1] ** 0.5, layout)
    packed = ops.pack_weight.reference(*weight, str(layout), x.shape[-1])
    return Sample(f"{layout} {tuple(x.shape)}", (x, packed, None, None, str(layout), n, compute))


def test_a_tier_is_added_but_not_chosen(built: dict[str, str]) -> None:
    assert list(built.values()) == [f"emulated_{tier}" for tier in EMULATED]
    assert _C.cpu_isa() == START and "emulated" not in _C.cpu_isas() + _C.compiled_cpu_isas()
    with pytest.raises(ValueError, match=r"path is 'none\.so': "):
        _C.add_cpu_isa("none.so")
    with pytest.raises(ValueError, match="no llmrt_tier built from these sources"):
        _C.add_cpu_isa(_C.__file__)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["quant_linear", "static_linear"])
def test_samples_equal_reference_in_double(name: str, dtype: torch.dtype, emulated: str) -> None:
    for sample in OPERATORS[name].sample_inputs(dtype):
        compare_with_double(OPERATORS[name], sample)


@pytest.mark.parametrize("compute", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("rows", [4, 5, 16, 17, 33, 70, 150])
def test_every_split_of_rows(rows: int, compute: str, emulated: str) -> None:
    for layout in (Layout(), Layout("int8", True, 32), Layout("nf4"), Layout("fp8_e4m3", False, 32)):
        if compute not in layout.format.computes:
            continue
        compare_with_double(OPERATORS["quant_linear"], call(torch.randn(rows, 416), 40, layout, compute))


@pytest.mark.parametrize("rows", [1, 7, 50])
def test_int8_products_have_the_bits_of_the_tier_below(rows: int, emulated: str) -> None:
    for layout in (Layout(), Layout("int4", True, 64), Layout("int8", True, 32), Layout("nf4", False, 32)):
        arguments = call(torch.randn(rows, 416), 40, layout).args
        actual = ops.quant_linear(*arguments)
        _C.force_cpu_isa(base_of(emulated))
        expected = ops.quant_linear(*arguments)
        _C.force_cpu_isa(f"emulated_{emulated}")
        assert torch.equal(actual, expected), layout


@pytest.mark.parametrize("bits", ["int4", "int8"])
@pytest.mark.parametrize("rows", [1, 40])
def test_largest_sums_are_exact(bits: str, rows: int, emulated: str) -> None:
    """All codes at their ends: pairs of products of 255 and 127 do not fit 16 bits."""
    layout = Layout(bits, True, 128, torch.float32)
    top = (1 << (4 if bits == "int4" else 8)) - 1
    codes = torch.full((32, 128 if top == 255 else 64), 255, dtype=torch.uint8)
    packed = ops.pack_weight(codes, torch.ones(32, 1), torch.zeros(32, 1, dtype=torch.uint8), str(layout), 128)
    signs = torch.where(torch.arange(rows)[:, None] % 2 == 0, 127.0, -127.0)
    y = ops.quant_linear(signs.expand(rows, 128), packed, None, None, str(layout), 32)
    assert torch.equal(y, (signs * 128 * top).expand(rows, 32))


@pytest.mark.parametrize("compute", ["int8", "bf16"])
def test_threads_and_nan(compute: str, emulated: str) -> None:
    x, threads = torch.randn(70, 256), torch.get_num_threads()
    x[6, 7], x[40, 8] = float("nan"), float("inf")
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.quant_linear(*call(x, 200, Layout(), compute).args))
    finally:
        torch.set_num_threads(threads)
    finite = [r not in (6, 40) for r in range(70)]
    for result in results:
        assert torch.equal(result[finite], results[0][finite]) and result[finite].isfinite().all()
        assert not result[6].isfinite().any() and not result[40].isfinite().any()


@pytest.mark.parametrize("rows", [4, 5, 16, 17, 33, 70])
def test_static_sums_are_exact(rows: int, emulated: str) -> None:
    x = torch.randint(-100, 156, (rows, 300)).float()
    codes = torch.randint(0, 256, (40, 300), dtype=torch.uint8)
    layout = Layout("int8", False, -1, torch.float32)
    packed = ops.pack_weight(codes, torch.ones(40, 1), None, str(layout), 300)
    y = ops.static_linear(x, packed, ops.weight_sums(codes), None, None, None, 1.0, 100, str(layout), 40)
    assert torch.equal(y.double(), x.double() @ (codes.double() - 128).T)
