"""Runs as a page: python scripts/report.py runs/norms, or several folders, such as two runs.

Differences are to `norm=layer`; to something else with, say, baseline=placement=pre. Writes into
the first folder, and prints the table: `report.html` (one file, works offline), the same tables as
CSV and Markdown, and pictures: `losses.png`, `curves.png`, `lr.png`, `depth.png`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gpt.cli.errors import run
from gpt.common.errors import MissingInput, UserError
from gpt.common.terminal import say
from gpt.reports.runs import load_summaries, print_table, unfinished, unsaid


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        return say(__doc__)
    chosen = [arg for arg in sys.argv[1:] if arg.startswith("baseline=")]
    folders = [Path(arg) for arg in sys.argv[1:] if arg not in chosen]
    if not folders or any(arg.startswith("-") for arg in sys.argv[1:]):
        raise UserError("expected folders of runs: python scripts/report.py runs/norms")
    for folder in folders:
        if not folder.is_dir():
            raise MissingInput(f"{folder}: no such folder")
    summaries = load_summaries(*folders)
    if not summaries:
        raise MissingInput(f"{folders[0]}: no finished run below it")
    from gpt.reports import page, plots  # plotly, matplotlib and scipy take seconds
    from gpt.reports.cells import Baseline, choose_baseline, make_cells

    cells = make_cells(summaries)
    versus = choose_baseline(chosen[-1], cells) if chosen else Baseline()
    print_table(summaries)
    left = unfinished(*folders)
    again = len(summaries) - sum(len(cell.runs) for cell in cells)
    notes = [f"Runs that are not finished, and not in here: {left}."] if left else []
    notes += [f"Runs that repeat another's, seed and all, left out: {again}."] if again else []
    say("".join(f"{note}\n" for note in notes), end="")
    title = " and ".join(str(folder) for folder in folders)
    notes = [*filter(None, [unsaid(summaries)]), *notes]
    paths = page.write(cells, folders[0], title, versus, notes)
    for path in [*paths, *plots.draw(cells, folders[0])]:
        say(str(path))


if __name__ == "__main__":
    run(main)
