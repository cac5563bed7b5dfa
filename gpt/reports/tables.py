"""What several runs show, in tables and in words, and what they do not."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from gpt.common.files import flatten, read_jsonl
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

MANY = 40  # cells with curves and heat maps of their own; tables and intervals have them all

# Of the last row of `stats.jsonl`: a column's name, the statistic's, and what of its depths.
# NumPy's least and largest are NaN where one of them is.
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
    """One row a cell, best first; what is not a result comes last."""
    best = {cell.label for cell in tuned(cells)}
    rows = []
    for cell in cells:
        first, losses = cell.runs[0], cell.losses
        row = {"cell": cell.label, "seeds": f"{len(losses)} of {len(cell.runs)}"}
        if len(best) < len(cells):
            row["best learning rate"] = "yes" if cell.label in best else ""
        nats = [r["val_loss"] for r in cell.runs if r["seed"] in losses]
        row["val loss"] = show(*interval(nats)) if nats else ""
        diverged = ", ".join(str(r["diverged_at"]) for r in cell.runs if "diverged_at" in r)
        if diverged:
            row["val loss"] += f"{' ' * bool(losses)}(diverged at step {diverged})"
        bpb = [r["val_bpb"] for r in cell.runs if "diverged_at" not in r and r["seed"] in losses]
        row["bits/byte"] = show(*interval(bpb)) if bpb else ""
        for mode in ("training", "evaluation"):
            row[f"sees in {mode}"] = " and ".join(cell.sees(mode)) or "its past"
        other = baseline(cell, cells, versus)
        paired = difference(cell, other) if other else None
        row[f"minus best {versus.key}={versus.value}"] = (
            show(*paired[:2], sign="+") if paired else ""
        )
        row["pairs"] = str(paired[2]) if paired else ""
        speeds = [r["tokens_per_s"] for r in cell.runs if r["tokens_per_s"]]  # 0: it never trained
        row["tokens/s"] = f"{interval(speeds)[0]:,.0f}" if speeds else ""
        # The least: what a process keeps of cells before it, counts too.
        row["peak memory"] = f"{min(r['peak_memory'] for r in cell.runs) / 2**20:,.0f} MiB"
        row["parameters"] = f"{first['params']:,}"
        order = interval(bpb)[0] if bpb else 0.0
        lost = len(cell.runs) - len(losses)
        rows.append((cell.void, lost / len(cell.runs), order, row))
    return [row for *_, row in sorted(rows, key=lambda r: r[:3])]


def activations(cells: list[Cell]) -> list[dict[str, str]]:
    """What the statistics were at a cell's end, one row a cell: means over its runs that
    did not diverge, or where all did over them."""
    rows = []
    for cell in cells:
        ended = [run for run in cell.runs if run["seed"] in cell.losses] or cell.runs
        stats = [read_jsonl(Path(run["run_dir"]) / "stats.jsonl") for run in ended]
        ends: list[dict[str, list[float]]] = []
        for lines in filter(None, stats):
            ends.append({})
            for name, _, value in each_number(lines[-1]):
                ends[-1].setdefault(name, []).append(math.nan if value is None else value)
        steps = sorted({lines[-1]["step"] for lines in stats if lines})
        row = {"cell": cell.label, "at step": ", ".join(map(str, steps))}
        for column, name, pick in ACTIVATIONS:
            picked = [pick(end[name]) for end in ends if name in end]
            row[column] = f"{interval(picked)[0]:.4g}" if picked else ""
        rows.append(row)
    return rows


def each_number(row: dict[str, Any]) -> Iterator[tuple[str, str, float | None]]:
    """The name, the depth or site, and the value of every number in a row of `stats.jsonl`; None is
    one that was not finite."""
    for group in row.keys() - {"step"}:
        for depth, entry in row[group].items():
            for key, value in flatten(entry, "/").items():
                if not isinstance(value, list):  # a histogram
                    yield f"{group}: {key}", depth, value


def compared(cell: Cell, other: Cell) -> str:
    """A sentence: whether one is better than the other, or that may be chance."""
    paired = difference(cell, other)
    if paired is None:
        return f"{cell.label} and {other.label} have no seed in common at which neither diverged."
    mean, half, pairs = paired
    line = f"{cell.label} against {other.label}: {show(mean, half, sign='+')} {UNITS[cell.unit]}"
    if half is None:
        line += ", of one seed: it may be chance."
    elif mean == half == 0:
        line += f" over {pairs} seeds: equal."
    elif abs(mean) > half:
        line += f" over {pairs} seeds: {'worse' if mean > 0 else 'better'} beyond chance."
    else:
        line += f" over {pairs} seeds: no difference that these seeds can tell."
    for one in (cell, other):
        if one.diverged:
            line += f" Of the runs of {one.label} {one.diverged}: this is of those that did not."
    if differ := unlike(cell, other):
        line += f" They differ in {' and '.join(differ)} too."
    if len(cell.rates) != len(other.rates):
        line += f" Learning rates tried: {len(cell.rates)} against {len(other.rates)}."
    elif cell.rates != other.rates:
        line += " They had different learning rates to choose from."
    return line


def text_of(cell: Cell) -> str:
    """What its runs were trained on."""
    return f"{cell.runs[0]['corpus']} ({cell.runs[0]['corpus_sha256'][:8]})"


def plain_words(cells: list[Cell], versus: Baseline) -> list[str]:
    """What the numbers show and what they do not, in sentences."""
    best = tuned(cells)
    lines = []
    whole = [c for c in best if not c.diverged and not c.void]
    if cells[0].unit == "val_bpb":
        lines.append("Tokenizers or texts differ: losses are compared in bits a byte.")
    texts = sorted({text_of(c) for c in cells})
    for text in texts:
        there = [c for c in whole if text_of(c) == text]
        if there:
            first = min(there, key=lambda c: interval(c.losses.values())[0])
            lowest = show(*interval(first.losses.values()))
            on = f" on {text}" if len(texts) > 1 else ""
            lines.append(
                f"The lowest validation loss{on} is {first.label}'s: {lowest} {UNITS[first.unit]}."
            )
    if len(best) < len(cells):
        lines.append(
            "Each is compared at the learning rate that was best for it, chosen by these very "
            "losses, which flatters it a little."
        )
    alone = []
    for cell in in_order(best):
        other = baseline(cell, cells, versus)
        if other is not None:
            lines.append(compared(cell, other))
        elif not versus.is_it(cell) and not cell.void:
            alone.append(cell.label)
    if alone:
        lines.append(f"Without a {versus.key}={versus.value} to compare with: {', '.join(alone)}.")
    for end, word in ((0, "lowest"), (-1, "highest")):
        tried = [c for c in best if len(c.rates) > 1 and c.losses and not c.void]
        edge = [c.label for c in tried if c.lr == c.rates[end]]
        if edge:
            lines.append(
                f"Best at the {word} learning rate that was tried, so that one beyond may be "
                f"better still: {', '.join(edge)}."
            )
    for cell in cells:
        diverged = [r for r in cell.runs if "diverged_at" in r]
        if diverged:
            lines.append(f"{cell.label}: {len(diverged)} of {len(cell.runs)} runs diverged.")
    if len({r["device"].split(":")[0] for c in cells for r in c.runs}) > 1:
        lines.append("Devices differ, and with them rounding, perhaps the precision.")
    if len(best) > MANY:
        lines.append(f"Curves and maps show the first {MANY} of {len(best)}.")
    for name, why in (("leaky", "sees what it must not"), ("unknown", "may see what it must not")):
        void = [c.label for c in cells if c.void and verdict(c.sees("evaluation")) == name]
        if void:
            lines.append(f"No result, for evaluation {why}: {', '.join(void)}.")
    lines.append(
        f"All this is on {' and '.join(texts)}, for models of these sizes, trained for so many "
        "steps at these learning rates; each interval is for one comparison, and among twenty one "
        "may miss. Training losses of runs that see others are not compared at all."
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
