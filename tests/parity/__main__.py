"""`python -m tests.parity DIR`: the table of largest errors, then `N passed, M failed`."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from tests.parity.run import run_all


def main(arguments: list[str]) -> int:
    """Run every case below the folder; 0 only when none failed."""
    if len(arguments) != 1:
        print("Name one folder of recorded cases: python -m tests.parity DIR", file=sys.stderr)
        return 2
    report = run_all(Path(arguments[0]))
    console = Console(width=None if sys.stdout.isatty() else 160)
    report.show(console)
    print(report.summary, flush=True)
    return 0 if report.failed == 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
