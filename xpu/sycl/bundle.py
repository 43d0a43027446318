"""Bundles: kernels that are compiled together at run time, and launching one of them on tensors."""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .toolchain import HERE, launcher

#: The element types that the sources' macros name.
TYPES = {
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "sycl::half",
    torch.int8: "int8_t",
}
#: Of an element's dtype where it is an argument (`load_kind` of element.hpp); powers of two are scales of weights only.
KINDS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e8m0fnu: 3,
    torch.int8: 4,
    torch.bool: 4,
}
#: How sources are compiled. SYCL keeps their intermediate code, and machine code under a key that is made of its SPIR-V. Names of values
#: are dropped from what is compiled but not from what is read back, so that a process that starts from kept intermediate code would have
#: other SPIR-V, and compile machine code again.
OPTIONS = ("-O2", "-fno-math-errno", "-fno-discard-value-names")
_KERNEL = re.compile(r"^KERNEL\(\w+\)\s*\w+ (\w+)\(", re.MULTILINE)
_lock = threading.Lock()
_building: dict[tuple[int, Bundle], threading.Lock] = {}
_bundles: dict[tuple[int, Bundle], int] = {}
_kernels: dict[tuple[int, Bundle, str], int] = {}


@dataclass(frozen=True)
class Bundle:
    """Sources of xpu/sycl that are compiled into one program.

    Args:
        sources: stems of the .cpp files, all in one program.
        constants: names that the sources use: of types (texts) and of integers.
    """

    sources: tuple[str, ...]
    constants: tuple[tuple[str, str | int], ...]

    @property
    def text(self) -> str:
        """The source that is compiled."""
        names = (
            f"{'constexpr int' if isinstance(value, int) else 'using'} {name} = {value};\n"
            for name, value in self.constants
        )
        return '#include "element.hpp"\n' + "".join((*names, *(_read(f"{stem}.cpp") for stem in self.sources)))

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of the kernels in it."""
        return tuple(name for stem in self.sources for name in _KERNEL.findall(_read(f"{stem}.cpp")))

    def __str__(self) -> str:
        """Return a short name for people."""
        values = " ".join(str(value).rpartition("::")[2] for _, value in self.constants)
        return f"{'+'.join(self.sources)} ({values})"


@lru_cache(maxsize=64)
def _read(name: str) -> str:
    return (HERE / name).read_text()


@lru_cache(maxsize=1)
def _headers() -> tuple[tuple[str, str], ...]:
    return tuple((path.name, path.read_text()) for path in sorted(HERE.glob("*.hpp")))


def _failed(what: str) -> RuntimeError:
    return RuntimeError(f"SYCL: {what} failed: {launcher().llmrt_error().decode()}")


@lru_cache(maxsize=1)
def cpu_queue() -> int:
    """Return a queue on SYCL's CPU device, where the kernels take the pointers of CPU tensors.

    Raises:
        RuntimeError: there is no such device (package intel-opencl-rt).
    """
    queue = launcher().llmrt_cpu_queue()
    if not queue:
        raise _failed("making a queue on the CPU device (it comes with the package intel-opencl-rt)")
    return int(queue)


def queue_of(device: torch.device) -> int:
    """Return the address of the queue that work of a device goes to: torch's current stream, or that of the CPU device."""
    if device.type == "cpu":
        return cpu_queue()
    return int(torch.xpu.current_stream(device).sycl_queue)


def build(queue: int, bundle: Bundle) -> int:
    """Compile a bundle for a queue's device (seconds the first time, later from the cache of SYCL) and return its handle."""
    headers = _headers()
    array = (ctypes.c_char_p * (2 * len(headers)))(*(text.encode() for pair in headers for text in pair))
    options = "".join(f"{option}\n" for option in OPTIONS)
    names = "".join(f"{name}\n" for name in bundle.kernels)
    handle = launcher().llmrt_build(queue, bundle.text.encode(), array, len(headers), options.encode(), names.encode())
    if not handle:
        raise _failed(f"compiling the bundle {bundle}")
    return int(handle)


def prepare(device: torch.device, bundle: Bundle) -> int:
    """Return the handle of a bundle for a device, compiling it if this process has not used it yet."""
    place = -1 if device.index is None else device.index
    with _lock:
        own = _building.setdefault((place, bundle), threading.Lock())
    with own:  # others may be compiled meanwhile
        if (place, bundle) not in _bundles:
            _bundles[place, bundle] = build(queue_of(device), bundle)
    return _bundles[place, bundle]


def kernel(device: torch.device, bundle: Bundle, name: str) -> int:
    """Return the handle of a kernel, compiling its bundle if this process has not used it yet."""
    place = -1 if device.index is None else device.index
    found = _kernels.get((place, bundle, name))
    if found is None:
        found = launcher().llmrt_kernel(prepare(device, bundle), name.encode())
        if not found:
            raise _failed(f"finding the kernel {name} in the bundle {bundle}")
        _kernels[place, bundle, name] = found
    return found


@lru_cache(maxsize=1024)
def _form(kinds: tuple[type, ...]) -> tuple[struct.Struct, bytes]:
    """Return how arguments of these types are put into bytes, and the launcher's letters for them."""
    letters = "".join("f" if kind is float else "q" if kind in (int, bool) else "p" for kind in kinds)
    return struct.Struct("<" + letters.replace("p", "Q")), letters.encode()


def launch(
    device: torch.device,
    bundle: Bundle,
    name: str,
    groups: Sequence[int],
    local: Sequence[int],
    *args: Tensor | int | float | bool | None,
) -> None:
    """Run a kernel on the device's current stream.

    Args:
        device: of the tensors.
        bundle: that has the kernel.
        name: of the kernel.
        groups: numbers of work-groups, 3; nothing runs when one is 0.
        local: sizes of a work-group, 3; the last one varies fastest and its consecutive items form sub-groups.
        args: the kernel's arguments: tensors as pointers (None as a null pointer), integers as int64_t, floats as float.

    Raises:
        RuntimeError: the bundle does not compile, or the launch fails; with SYCL's message.
    """
    if not all(groups):
        return
    queue = queue_of(device)
    handle = kernel(device, bundle, name)
    form, letters = _form(tuple(map(type, args)))
    values = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in args]
    span = (ctypes.c_size_t * 6)(*(g * s for g, s in zip(groups, local, strict=True)), *local)
    if not launcher().llmrt_launch(queue, handle, span, form.pack(*values), letters, device.type == "cpu"):
        raise _failed(f"launching the kernel {name} of the bundle {bundle}")
