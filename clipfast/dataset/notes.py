"""Counting what was passed over, with a few names for each reason: small, whatever the size of the data."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from clipfast.inputs import printable

SHOWN = 3


@dataclass
class Notes:
    """How often each reason occurred, and the first names for it.

    Attributes:
        counts: by reason.
        names: at most three by reason, printable.
    """

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Counts one."""
        self.counts[reason] += 1
        examples = self.names.setdefault(reason, [])
        if len(examples) < SHOWN:
            examples.append(printable(name))

    def merge(self, other: "Notes") -> None:
        """Adds the counts of another part of the data, after those of this one."""
        self.counts.update(other.counts)
        for reason, names in other.names.items():
            mine = self.names.setdefault(reason, [])
            mine += names[: SHOWN - len(mine)]

    def lines(self, before: str = "left out: ") -> list[str]:
        """A line for each reason, with its count and names."""
        return [f"{before}{reason}: {count} ({self.examples(reason)})" for reason, count in self.counts.items()]

    def examples(self, reason: str) -> str:
        """The first names for a reason."""
        return ", ".join(self.names[reason]) + (", …" if self.counts[reason] > SHOWN else "")

    def to_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return {reason: {"count": count, "names": self.names[reason]} for reason, count in self.counts.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What :meth:`to_json` gave."""
        return cls(
            Counter({reason: each["count"] for reason, each in content.items()}),
            {reason: list(each["names"]) for reason, each in content.items()},
        )
