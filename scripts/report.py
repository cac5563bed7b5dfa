"""Runs as a page: python scripts/report.py runs/norms, or several folders, such as two runs.

Writes into the first folder, and prints the table: `report.html` (one file, works offline),
`table.csv`, `table.md`, and `loss.png`, validation loss by step.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gpt import cli
from gpt.errors import MissingInput, UserError
from gpt.results import draw_curves, load_summaries, print_table


def main() -> None:
    folders = [Path(arg) for arg in sys.argv[1:]]
    if not folders or any(arg.startswith("-") for arg in sys.argv[1:]):
        raise UserError("expected folders of runs: python scripts/report.py runs/norms")
    for folder in folders:
        if not folder.is_dir():
            raise MissingInput(f"{folder}: no such folder")
    summaries = load_summaries(*folders)
    if not summaries:
        raise MissingInput(f"{folders[0]}: no finished run below it")
    from gpt.report import write  # plotly and scipy take a second

    print_table(summaries)
    draw_curves(summaries, folders[0] / "loss.png")
    title = " and ".join(str(folder) for folder in folders)
    for path in [*write(summaries, folders[0], title), folders[0] / "loss.png"]:
        print(path)


if __name__ == "__main__":
    cli.run(main)
