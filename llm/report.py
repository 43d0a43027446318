"""What `optimize` did to a model: `model.optimization_report`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


class OptimizationError(ValueError):
    """`optimize(strict=True)` would have left something unoptimized; the message lists it with the reasons."""


@dataclass(frozen=True)
class Entry:
    """One module or seam.

    Args:
        name: the module's name in the model, "" for the model itself.
        kind: what it is: linear, head, norm, mlp, rope, attention, cache, embedding ...
        by: what it became; None when it was not replaced.
        reason: why it was not, or a remark.
        expected: False when a faster form should exist and could not be used: what `strict` raises for.
    """

    name: str
    kind: str
    by: str | None = None
    reason: str | None = None
    expected: bool = True


@dataclass
class OptimizationReport:
    """Per module what was replaced, by what, and what was not and why. `print` it.

    Attributes:
        family: the model_type of the row that was used, or None if the model has none.
        entries: one per module or seam.
        bytes_before: of parameters and buffers.
        bytes_after: the same, after.
        graphs: a line for every graph that deployment mode captured, or could not; they come with the calls.
    """

    family: str | None
    model_type: str
    entries: list[Entry] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    graphs: list[str] = field(default_factory=list)

    def add(
        self, name: str, kind: str, by: str | None = None, reason: str | None = None, expected: bool = True
    ) -> None:
        """Append an `Entry`."""
        self.entries.append(Entry(name, kind, by, reason, expected))

    @property
    def replaced(self) -> list[Entry]:
        """What became something faster."""
        return [e for e in self.entries if e.by is not None]

    @property
    def kept(self) -> list[Entry]:
        """What stayed on purpose."""
        return [e for e in self.entries if e.by is None and e.expected]

    @property
    def unoptimized(self) -> list[Entry]:
        """What should have become faster and could not; `strict` raises if there is any."""
        return [e for e in self.entries if not e.expected]

    def raise_if_unoptimized(self) -> None:
        """Raise OptimizationError with the reasons if `unoptimized` is not empty."""
        if self.unoptimized:
            raise OptimizationError(
                "strict=True, and these would stay unoptimized:\n" + "\n".join(_lines(self.unoptimized))
            )

    def __str__(self) -> str:
        """Return a summary: equal entries of different layers in one line."""
        row = f"row {self.family!r}" if self.family else f"no row for {self.model_type!r}, found by structure"
        lines = [f"llmrt optimization report ({row})"]
        for title, entries in (("replaced", self.replaced), ("kept", self.kept), ("NOT optimized", self.unoptimized)):
            if entries:
                lines += [f"  {title}:", *("    " + line for line in _lines(entries))]
        if self.graphs:
            lines += ["  captured graphs:", *("    " + line for line in self.graphs)]
        before, after = self.bytes_before / 1e6, self.bytes_after / 1e6
        lines.append(f"  weights: {before:.1f} MB before, {after:.1f} MB after")
        return "\n".join(lines)


def _lines(entries: list[Entry]) -> list[str]:
    """One line per group of entries that differ only in layer numbers."""
    groups: Counter[tuple[str, str, str | None, str | None]] = Counter()
    for e in entries:
        pattern = ".".join("*" if part.isdigit() else part for part in e.name.split("."))
        groups[pattern, e.kind, e.by, e.reason] += 1
    lines = []
    for (pattern, kind, by, reason), count in groups.items():
        line = f"{pattern or '(model)'} [{kind}]" + (f" x {count}" if count > 1 else "")
        lines.append(line + (f" -> {by}" if by else "") + (f": {reason}" if reason else ""))
    return lines
