"""What this machine is to llmrt: CPU, ISA tier, threads, memory, measured limits, versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from .. import _C

#: What `_C.measure_peak` knows: bytes/s for read, operations/s for the rest.
PEAKS = ("read", "int8", "bf16", "fp32")
#: One probe runs about this long, in seconds: long enough to leave turbo's first milliseconds behind.
PROBE_SECONDS = 0.5


def examine(measure: bool = True) -> dict[str, Any]:
    """Return everything `llmrt doctor` prints, ready for JSON.

    Args:
        measure: run the probes of arithmetic and memory (about 4 seconds), first with one thread, then with all.
    """
    result: dict[str, Any] = {
        "cpu": {
            "name": cpu_name(),
            "cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "isa": isa_tiers(),
        "threads": {
            "torch": torch.get_num_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
            "openmp": openmp_runtimes(),
        },
        "huge_pages": huge_pages(),
        "xpu": xpu_state(),
        "versions": versions(),
    }
    if measure:
        most = min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
        result["measured"] = {str(n): measured_peaks(n) for n in sorted({1, most})}
    return result


def cpu_name() -> str:
    """Return the CPU's name as it gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def isa_tiers() -> dict[str, Any]:
    """Return the tier in use, why, those that this CPU could use, and all that are compiled in, best first."""
    available = _C.cpu_isas().split(", ")
    forced = os.environ.get("LLMRT_CPU_ISA")
    if forced:
        reason = f"LLMRT_CPU_ISA={forced}"
    elif available == ["reference"]:
        reason = "this CPU lacks AVX2, FMA or F16C: plain torch runs instead of kernels"
    else:
        reason = "the best that CPU and operating system support"
    return {
        "in_use": _C.cpu_isa(),
        "reason": reason,
        "available": available,
        "compiled": _C.compiled_cpu_isas().split(", "),
    }


def openmp_runtimes() -> list[str]:
    """Return the file names of the OpenMP runtimes in this process; more than one compete for the cores."""
    names = (Path(m.path).name for m in psutil.Process().memory_maps())
    return sorted({name for name in names if name.startswith(("libgomp", "libiomp5", "libomp"))})


def huge_pages() -> dict[str, Any]:
    """Return how the kernel backs large buffers: transparent huge pages mode, and reserved 2 MiB pages."""
    pages: dict[str, Any] = {"transparent": None, "reserved": None}
    try:
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        pages["transparent"] = modes[modes.index("[") + 1 : modes.index("]")]
    except (OSError, ValueError):
        pass
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("HugePages_Total:"):
                pages["reserved"] = int(line.split()[1])
    except OSError:
        pass
    return pages


def xpu_state() -> dict[str, Any]:
    """Return whether this torch can use an Intel GPU, and those that it sees."""
    built = torch.xpu._is_compiled()
    devices = [torch.xpu.get_device_name(i) for i in range(torch.xpu.device_count())] if built else []
    return {"torch_built_with_xpu": built, "devices": devices}


def versions() -> dict[str, str]:
    """Return the versions that a report needs."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()}
    for package in ("llmrt", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def measured_peaks(threads: int) -> dict[str, float | None]:
    """Return measured limits: read in bytes/s, int8, bf16 and fp32 in operations/s; None where the CPU has no such instruction."""
    return {kind: _C.measure_peak(kind, threads, PROBE_SECONDS) or None for kind in PEAKS}
