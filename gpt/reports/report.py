"""From folders of runs to a page, tables and plots."""

from __future__ import annotations

from pathlib import Path

from gpt.common.errors import MissingInput
from gpt.common.terminal import say
from gpt.reports.runs import (
    FinishedRun,
    blame_changed,
    load_runs,
    print_table,
    unfinished,
    unsaid,
)


def report(*folders: Path | str, baseline: str | None = None) -> list[Path]:
    """Print a table of the runs below `folders`; write their page, tables and plots into the first
    folder. Returns the paths that were written.

    baseline  KEY=VALUE: the setting of the cells to compare with; norm=layer by default
    """
    paths = [Path(folder).expanduser() for folder in folders]
    for path in paths:
        if not path.is_dir():
            raise MissingInput(f"{path}: no such folder")
    runs = load_runs(*paths)
    if not runs:
        raise MissingInput(f"{paths[0]}: no finished run below it")
    with blame_changed(runs):
        return write_report(paths, runs, baseline)


def write_report(paths: list[Path], runs: list[FinishedRun], baseline: str | None) -> list[Path]:
    from gpt.reports import page, plots  # plotly, matplotlib and scipy take seconds
    from gpt.reports.cells import Baseline, choose_baseline, make_cells

    cells = make_cells(runs)
    versus = choose_baseline(f"baseline={baseline}", cells) if baseline else Baseline()
    print_table(runs)
    left = unfinished(*paths)
    again = len(runs) - sum(len(cell.runs) for cell in cells)
    notes = [f"Unfinished runs left out: {left}."] if left else []
    notes += [f"Runs with the settings and seed of another run left out: {again}."] if again else []
    if altered := [f"{run.dir.name} ({', '.join(run.changed)})" for run in runs if run.changed]:
        notes.append(f"Runs whose files have changed since they finished: {'; '.join(altered)}.")
    for note in notes:
        say(note)
    title = " and ".join(str(path) for path in paths)
    notes = [*filter(None, [unsaid(runs)]), *notes]
    figures = plots.draw(cells)
    pngs = plots.save(figures, paths[0])
    svgs = [plots.to_svg(figure) for figure in figures.values()]
    return [*page.write(cells, paths[0], title, versus, notes, svgs), *pngs]
