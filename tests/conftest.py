import os

import pytest

#: A process of `pytest -n` shares its cores with others: a thread of it that waits for the next operator must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test sees the same random numbers alone, after others and in any order."""
    torch.manual_seed(0)
