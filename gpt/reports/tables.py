"""What several runs show, in tables and in sentences, and what they do not show."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import numpy as np

from gpt.common.files import flatten
from gpt.probes.verdict import verdict
from gpt.reports.cells import (
    UNITS,
    Baseline,
    Cell,
    baseline,
    difference,
    in_order,
    interval,
    tuned,
    unlike,
)

MANY = 40  # cells that have maps on the page; tables and plots have all cells

# A column of the table of activations, the statistic in the last row of `stats.jsonl`, and how its
# values at all depths become one. NumPy's least and largest are NaN if one of the values is.
ACTIVATIONS: tuple[tuple[str, str, Callable[[list[float]], float]], ...] = (
    ("stream rms at the embedding", "residual: after/rms", itemgetter(0)),
    ("after the last block", "residual: after/rms", itemgetter(-1)),
    ("its kurtosis", "residual: after/kurtosis", itemgetter(-1)),
    ("its variance between features", "residual: after/outliers", itemgetter(-1)),
    ("a block turns it by, least", "residual: angle", np.min),
    ("largest attention logit", "attention: max_logit", np.max),
    ("attention entropy, least", "attention: entropy", np.min),
    ("log Z", "output: log_z", np.max),
    ("tid_mean, largest", "sites: tid_mean", np.max),
    ("tid_std, largest", "sites: tid_std", np.max),
)


def show(value: float, half: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if half is None else f" ± {half:.4f}")


def comparison(cells: list[Cell], versus: Baseline) -> list[dict[str, str]]:
    """One row for each cell, best first. Cells whose losses are not results come last."""
    best = {cell.label for cell in tuned(cells)}

    def rank(cell: Cell) -> tuple[bool, float, float]:
        lost = 1 - len(cell.ended) / len(cell.runs)
        return cell.void, lost, mean_of(cell, "val_bpb") if cell.ended else 0.0

    rows = []
    for cell in sorted(cells, key=rank):
        row = {"cell": cell.label, "seeds": f"{len(cell.ended)} of {len(cell.runs)}"}
        if len(best) < len(cells):
            row["best learning rate"] = "yes" if cell.label in best else ""
        rows.append(row | results_of(cell) | versus_baseline(cell, cells, versus) | costs_of(cell))
    return rows


def mean_of(cell: Cell, key: str) -> float:
    return interval(run.summary[key] for run in cell.ended)[0]


def results_of(cell: Cell) -> dict[str, str]:
    """Losses over the runs that ended, where the others diverged, and what the cell sees."""
    nats, bits = (
        show(*interval(run.summary[key] for run in cell.ended)) if cell.ended else ""
        for key in ("val_loss", "val_bpb")
    )
    steps = ", ".join(str(run.summary["diverged_at"]) for run in cell.runs if run.diverged)
    diverged = f"(diverged at step {steps})" if steps else ""
    return {
        "val loss": " ".join(filter(None, [nats, diverged])),
        "bits/byte": bits,
        "sees in training": " and ".join(cell.sees("training")) or "its past",
        "sees in evaluation": " and ".join(cell.sees("evaluation")) or "its past",
    }


def versus_baseline(cell: Cell, cells: list[Cell], versus: Baseline) -> dict[str, str]:
    other = baseline(cell, cells, versus)
    paired = difference(cell, other) if other else None
    return {
        f"minus best {versus.key}={versus.value}": show(*paired[:2], sign="+") if paired else "",
        "pairs": str(paired[2]) if paired else "",
    }


def costs_of(cell: Cell) -> dict[str, str]:
    # A run that diverged at its start has a speed of 0.
    speeds = [speed for run in cell.runs if (speed := run.summary["tokens_per_s"])]
    # The smallest peak: a later run of a process also counts what earlier runs left in memory.
    memory = min(run.summary["peak_memory"] for run in cell.runs)
    return {
        "tokens/s": f"{interval(speeds)[0]:,.0f}" if speeds else "",
        "peak memory": f"{memory / 2**20:,.0f} MiB",
        "parameters": f"{cell.runs[0].summary['params']:,}",
    }


def activations(cells: list[Cell]) -> list[dict[str, str]]:
    """The last recorded statistics, one row for each cell: means over its runs that ended, or over
    all runs if none did."""
    rows = []
    for cell in cells:
        recorded = [run.stats for run in cell.ended or cell.runs if run.stats]
        ends: list[dict[str, list[float]]] = []
        for lines in recorded:
            ends.append({})
            for name, _, value in each_number(lines[-1]):
                ends[-1].setdefault(name, []).append(math.nan if value is None else value)
        steps = sorted({lines[-1]["step"] for lines in recorded})
        row = {"cell": cell.label, "at step": ", ".join(map(str, steps))}
        for column, name, pick in ACTIVATIONS:
            picked = [pick(end[name]) for end in ends if name in end]
            row[column] = f"{interval(picked)[0]:.4g}" if picked else ""
        rows.append(row)
    return rows


def each_number(row: dict[str, Any]) -> Iterator[tuple[str, str, float | None]]:
    """The name, the depth or site, and the value of every number in a row of `stats.jsonl`. The
    value is None if the number was not finite."""
    for group in row.keys() - {"step"}:
        for depth, entry in row[group].items():
            for key, value in flatten(entry, "/").items():
                if not isinstance(value, list):  # a histogram
                    yield f"{group}: {key}", depth, value


def plain_words(cells: list[Cell], versus: Baseline) -> list[str]:
    """What the numbers show and what they do not show, in sentences."""
    best = tuned(cells)
    lines = []
    if cells[0].unit == "val_bpb":
        lines.append("Tokenizers or texts differ: losses are compared in bits a byte.")
    lines += lowest_losses(best)
    if len(best) < len(cells):
        lines.append(
            "Each is compared at the learning rate that was best for it. It was chosen by these "
            "very losses, which flatters it a little."
        )
    lines += comparisons(best, cells, versus)
    lines += rates_at_the_edge(best)
    for cell in cells:
        diverged = sum(run.diverged for run in cell.runs)
        if diverged:
            lines.append(f"{cell.label}: {diverged} of {len(cell.runs)} runs diverged.")
    return lines + limits(cells)


def text_of(cell: Cell) -> str:
    """What its runs were trained on."""
    summary = cell.runs[0].summary
    return f"{summary['corpus']} ({summary['corpus_sha256'][:8]})"


def lowest_losses(best: list[Cell]) -> list[str]:
    """A sentence for each text."""
    lines = []
    texts = sorted({text_of(cell) for cell in best})
    for text in texts:
        whole = [c for c in best if not c.diverged and not c.void and text_of(c) == text]
        if whole:
            first = min(whole, key=lambda c: interval(c.losses.values())[0])
            on = f" on {text}" if len(texts) > 1 else ""
            loss = f"{show(*interval(first.losses.values()))} {UNITS[first.unit]}"
            lines.append(f"The lowest validation loss{on} is {first.label}'s: {loss}.")
    return lines


def comparisons(best: list[Cell], cells: list[Cell], versus: Baseline) -> list[str]:
    """A sentence for each cell that has a baseline, and one that names the cells without any."""
    lines, alone = [], []
    for cell in in_order(best):
        other = baseline(cell, cells, versus)
        if other is not None:
            lines.append(compared(cell, other))
        elif not versus.is_it(cell) and not cell.void:
            alone.append(cell.label)
    if alone:
        lines.append(f"Without a {versus.key}={versus.value} to compare with: {', '.join(alone)}.")
    return lines


def compared(cell: Cell, other: Cell) -> str:
    """Whether one cell is better than the other, or whether the difference may be chance."""
    paired = difference(cell, other)
    if paired is None:
        return f"{cell.label} and {other.label} have no seed in common at which neither diverged."
    mean, half, pairs = paired
    line = f"{cell.label} against {other.label}: {show(mean, half, sign='+')} {UNITS[cell.unit]}"
    if half is None:
        line += ", from one seed: it may be chance."
    elif mean == half == 0:
        line += f" over {pairs} seeds: equal."
    elif abs(mean) > half:
        line += f" over {pairs} seeds: {'worse' if mean > 0 else 'better'} beyond chance."
    else:
        line += f" over {pairs} seeds: no difference that these seeds can show."
    for one in (cell, other):
        if one.diverged:
            line += f" {one.label}: {one.diverged}, so only the other seeds are compared."
    if differ := unlike(cell, other):
        line += f" They differ in {' and '.join(differ)} too."
    if len(cell.rates) != len(other.rates):
        line += f" Learning rates tried: {len(cell.rates)} against {len(other.rates)}."
    elif cell.rates != other.rates:
        line += " They had different learning rates to choose from."
    return line


def rates_at_the_edge(best: list[Cell]) -> list[str]:
    """Which cells were best at the lowest or the highest learning rate that was tried."""
    lines = []
    tried = [c for c in best if len(c.rates) > 1 and c.losses and not c.void]
    for end, word in ((0, "lowest"), (-1, "highest")):
        edge = [c.label for c in tried if c.lr == c.rates[end]]
        if edge:
            lines.append(
                f"Best at the {word} learning rate that was tried, so one beyond it may be better "
                f"still: {', '.join(edge)}."
            )
    return lines


def limits(cells: list[Cell]) -> list[str]:
    """What these runs cannot show."""
    lines = []
    if len({run.summary["device"].split(":")[0] for c in cells for run in c.runs}) > 1:
        lines.append("Devices differ, and with them rounding and perhaps the precision.")
    shown = len(tuned(cells))
    if shown > MANY:
        lines.append(f"Maps show the first {MANY} of {shown}.")
    for name, why in (("leaky", "sees what it must not"), ("unknown", "may see what it must not")):
        void = [c.label for c in cells if c.void and verdict(c.sees("evaluation")) == name]
        if void:
            lines.append(f"Not a result, because evaluation {why}: {', '.join(void)}.")
    texts = " and ".join(sorted({text_of(cell) for cell in cells}))
    lines.append(
        f"All this holds for {texts}, and for models of these sizes trained for this many steps at "
        "these learning rates. Each interval is for one comparison: among twenty, one may miss. "
        "Training losses of runs that see other tokens or samples are not compared at all."
    )
    return lines


def to_csv(rows: list[dict[str, str]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def to_markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
