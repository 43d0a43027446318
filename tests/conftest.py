import os
import sys
from pathlib import Path

import pytest

#: A process of `pytest -n` shares its cores with others: a thread of it that waits for the next operator must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

sys.path.append(str(Path(__file__).parent))  # `from comparing import ...`

if not (torch.cuda.is_available() or torch.xpu.is_available()):
    #: Triton's kernels run on the CPU, in Python. Triton looks when it is imported, which torch does where it likes.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test sees the same random numbers alone, after others and in any order."""
    torch.manual_seed(0)
