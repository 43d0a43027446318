"""Where SYCL's runtime is, the launcher that is compiled against it once, and the folder that keeps what was compiled."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
INSTALL = "pip install 'llmrt[xpu]'"


class SyclUnavailable(RuntimeError):
    """What SYCL kernels need is missing on this machine; the message says what, and how to get it."""


def _prefixes() -> Iterator[Path]:
    """Yield folders whose include and lib may be SYCL's: an installed package's, the environment's, a oneAPI toolkit's."""
    try:
        files = importlib.metadata.files("intel-sycl-rt") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "sycl.hpp" and file.parent.name == "sycl":
            yield Path(str(file.locate())).resolve().parent.parent.parent
    yield Path(sys.prefix)
    if root := os.environ.get("ONEAPI_ROOT"):
        yield Path(root) / "compiler" / "latest"


@lru_cache(maxsize=1)
def prefix() -> Path | None:
    """Return the folder with include/sycl/sycl.hpp and lib/libsycl.so, or None if SYCL is not installed."""
    for folder in _prefixes():
        if (folder / "include/sycl/sycl.hpp").is_file() and (folder / "lib/libsycl.so").is_file():
            return folder
    return None


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Return what is missing to run SYCL kernels, and how to get it; None if nothing is."""
    if prefix() is None:
        return f"SYCL's runtime and headers are not found (package intel-sycl-rt): {INSTALL}"
    if shutil.which(compiler()) is None:
        return f"no C++ compiler {compiler()!r} is found: install g++, or name one in the variable CXX"
    return None


def compiler() -> str:
    """Return the command of the C++ compiler of host code."""
    return os.environ.get("CXX", "g++")


def cache_folder() -> Path:
    """Return the folder that keeps compiled launchers and kernels: LLMRT_CACHE, or llmrt in the user's cache folder."""
    named = os.environ.get("LLMRT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else base / "llmrt"


def _launcher_path(sycl: Path) -> Path:
    """Return where the launcher for this source, this SYCL and this compiler is kept."""
    library = (sycl / "lib/libsycl.so").resolve()
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    parts = ((HERE / "launcher.cpp").read_text(), str(library), str(library.stat().st_size), version)
    return cache_folder() / f"launcher-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


def build_launcher() -> Path:
    """Return the compiled launcher; compile it (about 3 s) if the cache does not have it.

    Raises:
        SyclUnavailable: SYCL or a compiler is missing, or compiling failed; with the compiler's first errors.
    """
    sycl = prefix()
    if (lack := missing()) is not None or sycl is None:
        raise SyclUnavailable(f"SYCL kernels cannot run: {lack}")
    target = _launcher_path(sycl)
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            command = [
                compiler(),
                "-std=c++17",
                "-O1",
                "-shared",
                "-fPIC",
                f"-I{sycl}/include",
                str(HERE / "launcher.cpp"),
            ]
            command += ["-o", str(made), f"-L{sycl}/lib", "-lsycl", f"-Wl,-rpath,{sycl}/lib"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise SyclUnavailable(f"the SYCL launcher does not compile: {' '.join(command)}\n{done.stderr[:2000]}")
            os.replace(made, target)  # another process may have made it meanwhile: the same bytes
    return target


@lru_cache(maxsize=1)
def launcher() -> ctypes.CDLL:
    """Return the loaded launcher. SYCL keeps compiled kernels in `cache_folder` unless its own variables say otherwise."""
    path = build_launcher()
    sycl = prefix()
    os.environ.setdefault("SYCL_CACHE_PERSISTENT", "1")
    os.environ.setdefault("SYCL_CACHE_DIR", str(cache_folder() / "kernels"))
    if sycl is not None and (sycl / "lib/libintelocl.so").is_file():  # SYCL's CPU device, beside what the system has
        os.environ.setdefault("OCL_ICD_FILENAMES", str(sycl / "lib/libintelocl.so"))
    library = ctypes.CDLL(str(path))
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    library.llmrt_error.restype = text
    library.llmrt_cpu_queue.restype = pointer
    library.llmrt_describe.restype, library.llmrt_describe.argtypes = text, [pointer]
    library.llmrt_build.restype = pointer
    library.llmrt_build.argtypes = [pointer, text, ctypes.POINTER(text), size, text, text]
    library.llmrt_kernel.restype, library.llmrt_kernel.argtypes = pointer, [pointer, text]
    library.llmrt_launch.restype = size
    library.llmrt_launch.argtypes = [pointer, pointer, pointer, text, text, size]
    return library
