"""The demo model's data: the source files of the running interpreter's standard library."""

import hashlib
import sysconfig
from pathlib import Path

_SKIPPED = ("/site-packages/", "/test/", "/tests/", "/idlelib/idle_test")


def library_files() -> tuple[list[Path], list[Path]]:
    """Return the (training, held-out) files of the standard library, sorted, without its tests.

    A file is held out when the SHA-1 of its path inside the library is divisible by 20, so the choice depends on
    nothing but the path. Other Python versions have other files.
    """
    root = sysconfig.get_paths()["stdlib"]
    training: list[Path] = []
    held_out: list[Path] = []
    for file in sorted(Path(root).rglob("*.py"), key=str):
        name = file.relative_to(root).as_posix()
        if not any(part in f"/{name}" for part in _SKIPPED):
            chosen = int(hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest(), 16) % 20 == 0
            (held_out if chosen else training).append(file)
    return training, held_out


def held_out_files() -> list[Path]:
    """Return the files that the demo model has not seen in training."""
    return library_files()[1]
