"""Kernels for GPUs are tested on the GPU that is there, or else on the CPU, where Triton interprets them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmrt import xpu

sys.path.insert(0, str(Path(__file__).parent))  # `from sample_checks import ...` in the tests of this folder


@pytest.fixture(scope="session")
def device() -> str:
    """The device that the Triton kernels run on."""
    return "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu"


@pytest.fixture
def kernels(device: str) -> Iterator[xpu.Installed]:
    """The Triton kernels, registered; a call that they do not serve raises RuntimeError."""
    with xpu.install(device, "triton", strict=True) as installed:
        yield installed


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """The references here are tiny; SYCL's CPU device has threads of its own, which torch's would fight."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
