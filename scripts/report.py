"""Runs as a page: python scripts/report.py runs/norms, or several folders, such as two runs.

Writes into the first folder, and prints the table: `report.html` (one file, works offline),
`table.csv`, `table.md`, and as pictures `losses.png`, `curves.png`, `lr.png`, `depth.png`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gpt import cli
from gpt.errors import MissingInput, UserError
from gpt.results import load_summaries, print_table, unfinished


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
    from gpt import pictures, report  # plotly, matplotlib and scipy take seconds
    from gpt.cells import make_cells

    print_table(summaries)
    title = " and ".join(str(folder) for folder in folders)
    left = unfinished(*folders)
    if left:
        print(f"runs that are not finished, and not in here: {left}")
    cells = make_cells(summaries)
    paths = report.write(cells, folders[0], title, left)
    for path in [*paths, *pictures.draw(cells, folders[0])]:
        print(path)


if __name__ == "__main__":
    cli.run(main)
