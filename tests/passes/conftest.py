import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `from quantized import ...` in the tests of this folder


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Dynamo remembers no graph of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
