"""No operator touches memory before or behind its arguments, whose addresses need not be multiples of anything."""

import ctypes
import mmap
from collections.abc import Iterator

import pytest
import torch
from comparing import run

from llmrt.ops import OPERATORS, Operator

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Fenced:
    """Copies of tensors that begin, or end, where a page begins that nobody may touch."""

    def __init__(self, at_end: bool, shift: int = 0) -> None:
        """Take the side; shift: bytes between the tensor and the fence."""
        self.at_end, self.shift = at_end, shift
        self.maps: list[tuple[int, int]] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor in memory of its own, strides included."""
        extent = (
            1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        )
        if not extent:
            return tensor
        data = tensor.as_strided((extent,), (1,)).clone().view(torch.uint8)
        size = len(data) + self.shift
        length = -(-size // PAGE) * PAGE
        base = _libc.mmap(
            None, length + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
        self.maps.append((base, length + 2 * PAGE))
        start = base + PAGE + (length - size if self.at_end else self.shift)
        own = torch.frombuffer((ctypes.c_char * len(data)).from_address(start), dtype=torch.uint8)
        own.copy_(data)
        for fence in (base, base + PAGE + length):
            assert _libc.mprotect(fence, PAGE, 0) == 0
        return torch.frombuffer((ctypes.c_char * len(data)).from_address(start), dtype=tensor.dtype).as_strided(
            tensor.shape, tensor.stride()
        )

    def free(self) -> None:
        """Unmap everything: no copy may be used any more."""
        for base, length in self.maps:
            _libc.munmap(base, length)
        self.maps.clear()


@pytest.fixture(params=["back", "odd address"])
def fenced(request: pytest.FixtureRequest) -> Iterator[Fenced]:
    fence = Fenced(request.param == "back", 1 if request.param == "odd address" else 0)
    yield fence
    fence.free()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat((tensor.reshape(-1),)).view(torch.uint8)


@pytest.mark.parametrize("name", OPERATORS)
def test_only_arguments_are_touched(name: str, fenced: Fenced, kernel_isa: str) -> None:
    op: Operator = OPERATORS[name]
    for sample in op.sample_inputs(torch.bfloat16) + op.sample_inputs(torch.float32)[::4]:
        expected = run(op, sample.clone())
        actual = run(op, sample.map(fenced))
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == e.dtype and torch.equal(bits(a), bits(e)), sample.name
        del a, actual
        fenced.free()
