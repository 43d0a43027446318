import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `from sample_checks import ...` in the tests of this folder


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """The references here are tiny; SYCL's CPU device has threads of its own, which torch's would fight."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
