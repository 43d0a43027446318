"""Memory that weights occupy: what is handed back to the system, and when."""

from __future__ import annotations

import ctypes
import mmap
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from .huge_pages import madvise

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ...(.) \S+ \S+ (\d+)")


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def return_free_memory() -> None:
    """Hand freed blocks back to the system where the C library can (glibc keeps those below its mmap threshold)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, each storage counted once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(model)}
    return sum(sizes.values())


class FilePages:
    """Weight files that a model's tensors map, as safetensors does when it loads them.

    Every weight that is read makes the process larger until the file is unmapped, which one small tensor prevents. But pages that
    nobody wrote to can be dropped at any time: they come back from the file, or the system's cache of it, when they are touched.

    Args:
        model: whose files are meant. Mappings in which a page was written (such a page is no longer the file's) are left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look up the mappings."""
        addresses = sorted(t.data_ptr() for t in tensors_of(model) if t.device.type == "cpu")
        self._spans = [
            (start, end)
            for start, end in (_unwritten_mappings() if madvise() is not None else ())
            if bisect_left(addresses, start) < bisect_left(addresses, end)
        ]

    def release(self) -> None:
        """Drop the pages: the process is as small as before they were read."""
        for start, end in self._spans:
            self._advise(start, end, mmap.MADV_DONTNEED)

    def read_ahead(self, tensors: Iterable[Tensor]) -> None:
        """Let the system start to read tensors from disk: page by page, on demand, takes twice as long."""
        for tensor in tensors:
            first = tensor.data_ptr() if tensor.device.type == "cpu" else 0
            if any(start <= first < end for start, end in self._spans):
                page = first // mmap.PAGESIZE * mmap.PAGESIZE
                self._advise(page, first + tensor.nbytes, mmap.MADV_WILLNEED)

    def _advise(self, start: int, end: int, advice: int) -> None:
        if (call := madvise()) is not None:
            call(start, end - start, advice)  # a refusal changes nothing


def _unwritten_mappings() -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the private mappings of files that have no page of their own."""
    try:
        with open("/proc/self/smaps") as file:
            text = file.read()
    except OSError:
        return
    span, own = None, 0
    for line in [*text.splitlines(), "0-0 ---p 0 0 0"]:
        if (match := _MAPPING.match(line)) is not None:
            if span is not None and own == 0:
                yield span
            private_file = match[3] == "p" and match[4] != "0"
            span, own = (int(match[1], 16), int(match[2], 16)) if private_file else None, 0
        elif line.startswith(("Anonymous:", "Swap:")):
            own += int(line.split()[1])
