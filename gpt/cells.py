"""Runs that differ in their seed alone are one cell; cells are compared pair by pair.

Intervals are 95%, Student's t over seeds. Differences are paired by seed: the same initial weights
and the same batches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from scipy.stats import t as student

from gpt.results import distinguish, read_config

Summary = dict[str, Any]
BASELINE = "layer"


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seed alone.

    context: what its baseline shares with it. setting: its label without the learning rate.
    rates: the learning rates that were tried in its setting, of which `tuned` took its own.
    """

    label: str
    setting: str
    context: str
    norm: str
    runs: list[Summary]
    rates: tuple[float, ...] = ()

    @property
    def leaky(self) -> bool:
        """Whether evaluation sees what it must not: its losses are no results."""
        return any(run["sees_in_evaluation"] for run in self.runs)

    @property
    def lr(self) -> float:
        """The peak learning rate; NaN where the configuration is not there."""
        return float(read_config(self.runs[0]["run_dir"]).get("optim.lr", math.nan))

    def losses(self) -> dict[int, float]:
        """Validation loss by seed, of runs that came to an end."""
        good = [r for r in self.runs if "diverged_at" not in r and r["val_loss"] is not None]
        return {r["seed"]: r["val_loss"] for r in good}


def make_cells(summaries: list[Summary]) -> list[Cell]:
    """Of runs with equal seeds in one cell the first is taken."""
    labels = distinguish(summaries)
    grouped: dict[str, dict[int, Summary]] = {}
    for summary, label in zip(summaries, labels, strict=True):
        seeds = grouped.setdefault(label.replace(f"-s{summary['seed']}", "", 1), {})
        seeds.setdefault(summary["seed"], summary)
    cells = []
    for label, seeds in grouped.items():
        runs = [seeds[seed] for seed in sorted(seeds)]
        norm = runs[0]["norm"]
        setting = [w for w in label.split() if not w.startswith("optim.lr=")]
        # What says which norm it is, is no part of what its baseline shares with it.
        words = [setting[0].removeprefix(f"{norm}-"), *setting[1:]]
        context = [w for w in words if not w.startswith(("norm.", "init.swap_norm="))]
        cells.append(Cell(label, " ".join(setting), " ".join(context), norm, runs))
    return cells


def tuned(cells: list[Cell]) -> list[Cell]:
    """Of the cells that differ in `optim.lr` alone the best, so that none loses for another's rate.

    Best is the lowest mean validation loss over seeds, among those of which most seeds came to an
    end.
    """
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(cell.setting, []).append(cell)

    def rank(cell: Cell) -> tuple[int, float]:
        losses = cell.losses()
        return -len(losses), interval(losses.values())[0] if losses else math.inf

    return [
        replace(min(group, key=rank), rates=tuple(sorted(cell.lr for cell in group)))
        for group in grouped.values()
    ]


def interval(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and half the width of its 95% interval; None for a single value."""
    xs = list(values)
    mean = math.fsum(xs) / len(xs)
    if len(xs) < 2:
        return mean, None
    variance = math.fsum((x - mean) ** 2 for x in xs) / (len(xs) - 1)
    return mean, float(student.ppf(0.975, len(xs) - 1)) * math.sqrt(variance / len(xs))


def baseline(cell: Cell, cells: list[Cell]) -> Cell | None:
    """The `layer` cell, at its best learning rate, that differs in nothing else but the norm.

    None where there is none, or several.
    """
    if cell.norm == BASELINE or cell.leaky:
        return None
    mine = read_config(cell.runs[0]["run_dir"])

    def agrees(other: Cell) -> bool:
        theirs = read_config(other.runs[0]["run_dir"])
        shared = [k for k in mine.keys() & theirs.keys() if k.startswith("norm.")]
        return all(mine[k] == theirs[k] for k in shared if k != "norm.name")

    found = [c for c in cells if c.norm == BASELINE and c.context == cell.context and not c.leaky]
    found = [c for c in tuned(found) if agrees(c)] or tuned(found)
    return found[0] if len(found) == 1 else None


def difference(cell: Cell, cells: list[Cell]) -> tuple[float, float | None, int] | None:
    """Validation loss minus the baseline's at the same seeds: mean, half width, number of pairs."""
    other = baseline(cell, cells)
    if other is None:
        return None
    ours, theirs = cell.losses(), other.losses()
    pairs = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    return (*interval(pairs), len(pairs)) if pairs else None


def in_order(cells: list[Cell]) -> list[Cell]:
    """By what they share with their baselines, then by norm."""
    contexts = ordered({cell.context for cell in cells})
    return sorted(cells, key=lambda c: (contexts.index(c.context), c.setting))


def ordered(names: Iterable[str]) -> list[str]:
    """Sorted, numbers by their size: bs2 before bs16."""

    def key(name: str) -> list[tuple[int, str]]:
        pieces = re.split(r"(\d+)", name)
        return [(int(p), "") if p.isdigit() else (-1, p) for p in pieces]

    return sorted(names, key=key)
