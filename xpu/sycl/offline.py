"""What Intel's offline compiler makes of the kernels: SIMD width, registers and spills on GPUs that this machine does not have.

The SPIR-V of a bundle comes from SYCL (SYCL_DUMP_IMAGES=1), the machine code from ``ocloc`` (Debian: intel-opencl-icd), the figures from
the section .ze_info of its ELF file (level-zero's "zebin" format).
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .bundle import Bundle, build, cpu_queue

#: ocloc's names of Arc (Alchemist) and Data Center GPU Max.
DEVICES = ("dg2", "pvc")


@dataclass(frozen=True)
class KernelFigures:
    """One kernel on one GPU.

    Args:
        bundle: text of the bundle.
        kernel: its name.
        device: ocloc's name of the GPU.
        simd: items of a hardware thread.
        registers: of a thread, of 32 bytes (64 on pvc).
        spilled: bytes of a thread that do not fit into registers.
        private: bytes of a thread for arrays that are not in registers.
    """

    bundle: str
    kernel: str
    device: str
    simd: int
    registers: int
    spilled: int
    private: int


def spirv(bundles: Sequence[Bundle]) -> list[list[bytes]]:
    """Return the SPIR-V of each bundle, in the parts that SYCL splits it into.

    A process of its own compiles them, since SYCL reads the variable for it at its start.
    """
    with tempfile.TemporaryDirectory() as folder:
        code = f"from {__name__} import _dump; _dump({[(b.sources, b.constants) for b in bundles]!r})"
        root = Path(__file__).resolve().parents[len(__name__.split(".")) - 2]
        path = os.pathsep.join((str(root), *filter(None, [os.environ.get("PYTHONPATH")])))
        environment = {**os.environ, "SYCL_DUMP_IMAGES": "1", "PYTHONPATH": path}
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"SYCL: compiling for the offline compiler failed:\n{done.stderr[-2000:]}")
        found = (sorted(Path(folder).glob(f"{i}-*.spv")) for i in range(len(bundles)))
        return [[path.read_bytes() for path in paths] for paths in found]


def _dump(bundles: Sequence[tuple[tuple[str, ...], tuple[tuple[str, str | int], ...]]]) -> None:
    """Build bundles and name what SYCL writes into the working folder by their places."""
    for i, (sources, constants) in enumerate(bundles):
        build(cpu_queue(), Bundle(sources, constants))
        for part, new in enumerate(sorted(Path.cwd().glob("sycl_*.spv"))):
            new.rename(f"{i}-{part}.spv")


def missing() -> str | None:
    """Return what is missing to run the offline compiler, or None."""
    return (
        None
        if shutil.which("ocloc")
        else "Intel's offline compiler ocloc is not found (Debian and Ubuntu: intel-opencl-icd)"
    )


def compile_for(device: str, code: bytes) -> bytes:
    """Return the machine code (zebin) of SPIR-V for a GPU.

    Raises:
        RuntimeError: ocloc is missing or refuses; with its messages.
    """
    if (lack := missing()) is not None:
        raise RuntimeError(lack)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in.spv").write_bytes(code)
        command = ["ocloc", "compile", "-file", "in.spv", "-spirv_input", "-device", device, "-output", "out"]
        command += ["-internal_options", "-ze-allow-zebin"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        made = list(Path(folder).glob("out*.bin"))
        if done.returncode != 0 or not made:
            raise RuntimeError(f"ocloc does not compile for {device}:\n{(done.stdout + done.stderr)[-2000:]}")
        return made[0].read_bytes()


def ze_info(binary: bytes) -> str:
    """Return the text of the section .ze_info of a 64-bit little-endian ELF file.

    Raises:
        ValueError: the file has no such section.
    """
    if binary[:5] == b"\x7fELF\x02":
        (start,), (size, count, names_at) = struct.unpack_from("<Q", binary, 40), struct.unpack_from("<3H", binary, 58)
        headers = [struct.unpack_from("<IIQQQQ", binary, start + i * size) for i in range(count)]
        names = headers[names_at][4] if names_at < count else len(binary)
        for name, _, _, _, offset, length in headers:
            if binary[names + name :].startswith(b".ze_info\0"):
                return binary[offset : offset + length].decode()
    raise ValueError("the binary has no section .ze_info; expected the output of ocloc with -ze-allow-zebin")


def figures(bundle: Bundle, device: str, binary: bytes) -> Iterator[KernelFigures]:
    """Yield the figures of every kernel in a bundle's machine code."""
    kernels = ze_info(binary).split("kernels_misc_info")[0].split("  - name:")[1:]
    for text in kernels:
        mangled = text.split(maxsplit=1)[0].strip("'\"")
        name = max((k for k in bundle.kernels if k in mangled), key=len, default=None)
        if name is None:
            continue  # a table of symbols

        def number(key: str, where: str = text) -> int:
            found = re.search(rf"{key}:\s+(\d+)", where)
            return int(found[1]) if found else 0

        buffers = {
            match[1]: int(match[2]) for match in re.finditer(r"- type:\s+(\w+)\s+usage:\s+\w+\s+size:\s+(\d+)", text)
        }
        yield KernelFigures(
            str(bundle), name, device, number("simd_size"), number("grf_count"),
            number("spill_size") or buffers.get("scratch", 0), number("private_size") or buffers.get("global", 0),
        )  # fmt: skip


def survey(bundles: Sequence[Bundle], devices: Sequence[str] = DEVICES) -> Iterator[KernelFigures]:
    """Yield the figures of every kernel of every bundle on every GPU."""
    for bundle, parts in zip(bundles, spirv(bundles), strict=True):
        for device in devices:
            for code in parts:
                yield from figures(bundle, device, compile_for(device, code))
