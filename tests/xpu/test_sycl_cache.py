"""What SYCL keeps of a bundle is what the next process looks for."""

import os
import secrets
from pathlib import Path

import pytest

from llmrt.xpu.sycl.bundle import Bundle, build, cpu_queue
from llmrt.xpu.sycl.toolchain import missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


class FreshBundle(Bundle):
    """A bundle that no cache has yet: its kernels have other names every time."""

    suffix = secrets.token_hex(8)

    @property
    def text(self) -> str:
        text = super().text
        for name in super().kernels:
            text = text.replace(f"void {name}(", f"void {name}_{self.suffix}(")
        return text

    @property
    def kernels(self) -> tuple[str, ...]:
        return tuple(f"{name}_{self.suffix}" for name in super().kernels)


def kept(mark: str) -> list[Path]:
    """Return the machine code that is kept of kernels with `mark` in their names: beside each lies the image it was made of."""
    sources = Path(os.environ["SYCL_CACHE_DIR"]).glob("[0-9]*/*/*/*/*.src")
    return [path.with_suffix(".bin") for path in sources if mark.encode() in path.read_bytes()]


def test_kept_intermediate_code_leads_to_the_kept_machine_code() -> None:
    bundle = FreshBundle(("norm", "rope"), (("T", "float"),))
    build(cpu_queue(), bundle)
    made = kept(bundle.suffix)
    assert made and all(path.is_file() for path in made)
    build(cpu_queue(), bundle)  # begins with the intermediate code that is kept by now, as another process does
    assert sorted(kept(bundle.suffix)) == sorted(made)
