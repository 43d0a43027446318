"""Memory of key/value buffers: huge pages are asked for where they help."""

import mmap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmrt.llm import cache_memory

CPU = torch.device("cpu")


def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Return the list to which every wish for huge pages is added: address, bytes, advice."""
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(cache_memory, "_madvise", lambda: lambda *call: calls.append(call))
    return calls


def test_large_buffers_ask_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = advised(monkeypatch)
    buffer = cache_memory.empty((2, 4, 8192, 64), torch.bfloat16, CPU)
    assert buffer.shape == (2, 4, 8192, 64) and buffer.dtype == torch.bfloat16 and buffer.is_contiguous()
    [(start, size, advice)] = calls
    end = buffer.data_ptr() + buffer.nbytes
    assert start % cache_memory.HUGE_PAGE == 0 and buffer.data_ptr() <= start and start + size == end
    assert advice == mmap.MADV_HUGEPAGE


def test_small_and_fake_buffers_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = advised(monkeypatch)
    cache_memory.empty((1, 2, 64, 64), torch.float32, CPU)
    with FakeTensorMode():
        cache_memory.empty((64, 8, 8192, 64), torch.float32, CPU)
    assert not calls


def test_contents_survive_the_real_call() -> None:
    buffer = cache_memory.empty((3, 1 << 20), torch.float32, CPU)
    buffer.copy_(torch.arange(3)[:, None])
    assert buffer.double().mean(1).tolist() == [0, 1, 2]


def test_without_madvise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_memory, "_madvise", lambda: None)
    assert cache_memory.empty((1 << 23,), torch.int8, CPU).shape == (1 << 23,)
