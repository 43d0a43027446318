"""Huge pages are asked for where they help, and change no value."""

import mmap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmrt.llm import huge_pages

CPU = torch.device("cpu")


def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Return the list to which every wish for huge pages is added: address, bytes, advice."""
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(huge_pages, "madvise", lambda: lambda *call: calls.append(call))
    return calls


def test_large_buffers_ask_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = advised(monkeypatch)
    buffer = huge_pages.empty((2, 4, 8192, 64), torch.bfloat16, CPU)
    assert buffer.shape == (2, 4, 8192, 64) and buffer.dtype == torch.bfloat16 and buffer.is_contiguous()
    [(start, size, advice)] = calls
    end = buffer.data_ptr() + buffer.nbytes
    assert start % huge_pages.HUGE_PAGE == size % huge_pages.HUGE_PAGE == 0
    assert buffer.data_ptr() <= start and end - huge_pages.HUGE_PAGE < start + size <= end
    assert advice == mmap.MADV_HUGEPAGE


def test_small_and_fake_buffers_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = advised(monkeypatch)
    huge_pages.empty((1, 2, 64, 64), torch.float32, CPU)
    with FakeTensorMode():
        huge_pages.empty((64, 8, 8192, 64), torch.float32, CPU)
    assert not calls


def test_contents_survive_the_real_call() -> None:
    buffer = huge_pages.empty((3, 1 << 20), torch.float32, CPU)
    buffer.copy_(torch.arange(3)[:, None])
    assert buffer.double().mean(1).tolist() == [0, 1, 2]


def test_without_madvise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "madvise", lambda: None)
    assert huge_pages.empty((1 << 23,), torch.int8, CPU).shape == (1 << 23,)


@pytest.mark.parametrize("elements", [0, 5, 3 << 20])
def test_huge_pages_change_no_value(elements: int) -> None:
    weight = torch.arange(elements, dtype=torch.float32)
    huge_pages.move_to_huge_pages([weight, weight[1:], weight[::2], weight.to("meta")])
    assert torch.equal(weight, torch.arange(elements, dtype=torch.float32))
    for part in (weight, weight[1::2]):
        copied = huge_pages.converted(part, torch.bfloat16)
        assert torch.equal(copied, part.bfloat16()) and copied.is_contiguous()
