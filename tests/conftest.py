import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test sees the same random numbers alone, after others and in any order."""
    torch.manual_seed(0)
