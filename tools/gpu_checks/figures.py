"""What a part has measured, beside its goals: as JSON and as a table."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number; ``at_most`` says on which side of ``goal`` it is to lie.

    ``measured`` None: it could not be taken here, and ``note`` says why. Without a goal it is
    reported only.
    """

    name: str
    measured: float | None
    goal: float | None = None
    at_most: bool = True
    unit: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None where there is nothing to meet, or nothing was measured."""
        if self.goal is None or self.measured is None:
            return None
        return self.measured <= self.goal if self.at_most else self.measured >= self.goal

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Name, measured, goal, whether it is met."""
        measured = "—" if self.measured is None else f"{self.measured:.4g} {self.unit}".strip()
        goal = ""
        if self.goal is not None:
            goal = f"{'≤' if self.at_most else '≥'} {self.goal:g} {self.unit}".strip()
        met = {True: "yes", False: "NO", None: ""}[self.met]
        return self.name, measured, goal, met if not self.note else f"{met} {self.note}".strip()


@dataclass(slots=True)
class Report:
    """The figures of one part; ``details`` is what they were computed from."""

    part: str
    machine: str
    figures: list[Figure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def all_met(self) -> bool:
        return all(figure.met is not False for figure in self.figures)

    def write(self, folder: Path) -> Path:
        """Writes ``PART.json`` into ``folder``, which need not exist."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.part}.json"
        document = {
            "part": self.part,
            "machine": self.machine,
            "figures": [
                {
                    "name": figure.name,
                    "measured": figure.measured,
                    "unit": figure.unit,
                    "goal": figure.goal,
                    "at_most": figure.at_most,
                    "met": figure.met,
                    "note": figure.note,
                }
                for figure in self.figures
            ],
            "details": self.details,
        }
        path.write_text(json.dumps(document, indent=1) + "\n")
        return path

    def table(self) -> str:
        """The figures as aligned lines, the title first."""
        rows = [("figure", "measured", "goal", "met?"), *(figure.row for figure in self.figures)]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [f"{self.part} on {self.machine}"]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        lines.insert(2, "  ".join("-" * width for width in widths))
        return "\n".join(lines)
