"""From folders of runs to a page, tables and pictures."""

from __future__ import annotations

from pathlib import Path

from gpt.common.errors import MissingInput
from gpt.common.terminal import say
from gpt.reports.runs import load_summaries, print_table, unfinished, unsaid


def report(*folders: Path | str, baseline: str | None = None) -> list[Path]:
    """Print a table of the runs below `folders`, and write the page, tables and pictures of them
    into the first one; returns what was written.

    baseline  KEY=VALUE, what runs are compared with; by default norm=layer
    """
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if not path.is_dir():
            raise MissingInput(f"{path}: no such folder")
    summaries = load_summaries(*paths)
    if not summaries:
        raise MissingInput(f"{paths[0]}: no finished run below it")
    from gpt.reports import page, plots  # plotly, matplotlib and scipy take seconds
    from gpt.reports.cells import Baseline, choose_baseline, make_cells

    cells = make_cells(summaries)
    versus = choose_baseline(f"baseline={baseline}", cells) if baseline else Baseline()
    print_table(summaries)
    left = unfinished(*paths)
    again = len(summaries) - sum(len(cell.runs) for cell in cells)
    notes = [f"Runs that are not finished, and not in here: {left}."] if left else []
    notes += [f"Runs that repeat another's, seed and all, left out: {again}."] if again else []
    for note in notes:
        say(note)
    title = " and ".join(str(path) for path in paths)
    notes = [*filter(None, [unsaid(summaries)]), *notes]
    written = page.write(cells, paths[0], title, versus, notes)
    return [*written, *plots.draw(cells, paths[0])]
