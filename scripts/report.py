"""Makes a page of runs: python scripts/report.py runs/norms, or several folders, such as two runs.

Differences are relative to `norm=layer`; baseline=placement=pre, for example, changes that. The
script prints the table. Into the first folder it writes `report.html` (one file, works offline),
the same tables as CSV and Markdown, and the pictures `losses.png`, `curves.png`, `lr.png` and
`depth.png`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gpt.cli.errors import run
from gpt.common.errors import UserError
from gpt.common.terminal import say
from gpt.reports.report import report


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        return say(__doc__)
    chosen = [arg for arg in sys.argv[1:] if arg.startswith("baseline=")]
    folders = [Path(arg) for arg in sys.argv[1:] if arg not in chosen]
    if not folders or any(arg.startswith("-") for arg in sys.argv[1:]):
        raise UserError("expected folders of runs: python scripts/report.py runs/norms")
    versus = chosen[-1].removeprefix("baseline=") if chosen else None
    for path in report(*folders, baseline=versus):
        say(str(path))


if __name__ == "__main__":
    run(main)
