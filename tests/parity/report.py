"""What a parity run found: one record per case, the largest error per quantity, one line at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

EXACT = 0.0  # a tolerance: every value must be equal


@dataclass
class Quantity:
    """The worst of one quantity over all cases."""

    tolerance: str
    worst: float = 0.0
    where: str = ""
    values: int = 0
    failed: int = 0


@dataclass
class Case:
    """One counted case.

    Args:
        name: folder and identity.
        kind: what is counted, e.g. "model case".
        report: takes the errors.
        problems: why it failed; empty when it passed.
    """

    name: str
    kind: str
    report: Report = field(repr=False)
    problems: list[str] = field(default_factory=list)

    def close(self, quantity: str, ours: Any, recorded: Any, tolerance: float, *, relative: float = 0.0) -> None:
        """Compare numbers: within `tolerance` absolute, or within `relative` of the recorded value."""
        a, b = _array(ours), _array(recorded)
        shown = "exact" if tolerance == EXACT and not relative else f"{tolerance:g}"
        if relative:
            shown = f"{relative:g} rel. or {tolerance:g}"
        if a.shape != b.shape:
            self._note(quantity, shown, float("inf"), 0, f"{quantity}: shape {a.shape}, recorded {b.shape}")
            return
        error = np.abs(a.astype(np.float64) - b.astype(np.float64))
        worst = float(error.max()) if error.size else 0.0
        allowed = np.maximum(tolerance, relative * np.abs(b.astype(np.float64)))
        bad = not bool((error <= allowed).all())  # a NaN is bad
        self._note(
            quantity, shown, worst, error.size, f"{quantity}: off by {worst:.3g} (allowed {shown})" if bad else ""
        )

    def equal(self, quantity: str, ours: Any, recorded: Any) -> None:
        """Compare whole numbers or texts, exactly."""
        if isinstance(recorded, np.ndarray | torch.Tensor):
            self.close(quantity, ours, recorded, EXACT)
            return
        same = ours == recorded
        self._note(
            quantity,
            "exact",
            0.0 if same else float("inf"),
            1,
            "" if same else f"{quantity}: {str(ours)[:160]!r}, recorded {str(recorded)[:160]!r}",
        )

    def require(self, quantity: str, holds: bool, problem: str) -> None:
        """A condition."""
        self._note(quantity, "holds", 0.0 if holds else float("inf"), 1, "" if holds else f"{quantity}: {problem}")

    def _note(self, quantity: str, tolerance: str, error: float, values: int, problem: str) -> None:
        if problem:
            self.problems.append(problem)
        self.report.note(self, quantity, tolerance, error, values, bool(problem))


class Report:
    """All cases of a run."""

    def __init__(self) -> None:
        self.cases: list[Case] = []
        self._quantities: dict[tuple[str, str], Quantity] = {}

    @contextmanager
    def case(self, kind: str, name: str) -> Iterator[Case]:
        """Count a case; an exception inside is a failure of this case, not the end of the run."""
        case = Case(name, kind, self)
        self.cases.append(case)
        try:
            yield case
        except Exception as error:
            case.problems.append(f"{type(error).__name__}: {error}")

    def fail(self, kind: str, name: str, problem: str) -> None:
        """Count something that could not be run as a failure."""
        self.cases.append(Case(name, kind, self, [problem]))

    def note(self, case: Case, quantity: str, tolerance: str, error: float, values: int, failed: bool) -> None:
        """Remember a comparison."""
        entry = self._quantities.setdefault((case.kind, quantity), Quantity(tolerance))
        entry.values += values
        entry.failed += failed
        if not entry.where or error > entry.worst or error != error:
            entry.worst, entry.where = error, case.name

    @property
    def failed(self) -> int:
        """Number of failed cases."""
        return sum(1 for case in self.cases if case.problems)

    @property
    def passed(self) -> int:
        """Number of passed cases."""
        return len(self.cases) - self.failed

    @property
    def summary(self) -> str:
        """The line a run ends with."""
        return f"{self.passed} passed, {self.failed} failed"

    def show(self, console: Console, most: int = 40) -> None:
        """Tables of counts and errors, the first failures, then the summary."""
        counts = Table("kind", "passed", "failed")
        for kind in dict.fromkeys(case.kind for case in self.cases):
            group = [case for case in self.cases if case.kind == kind]
            bad = sum(1 for case in group if case.problems)
            counts.add_row(kind, str(len(group) - bad), str(bad))
        console.print(counts)
        errors = Table("kind", "quantity", "values", "largest error", "allowed", "largest at", "failed")
        for (kind, quantity), entry in self._quantities.items():
            shown = f"{entry.worst:.2e}" if entry.worst else "0"
            where = entry.where if entry.worst else ""
            errors.add_row(kind, quantity, str(entry.values), shown, entry.tolerance, where, str(entry.failed or ""))
        console.print(errors)
        bad_cases = [case for case in self.cases if case.problems]
        for case in bad_cases[:most]:
            console.print(
                f"FAILED {case.kind} {case.name}: {'; '.join(case.problems[:4])}", markup=False, highlight=False
            )
        if len(bad_cases) > most:
            console.print(f"... and {len(bad_cases) - most} more")


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    return np.asarray(value)
