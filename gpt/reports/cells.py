"""Runs that differ only in their seed form a cell; cells are compared pair by pair.

Intervals are 95%, by Student's t over seeds. Differences are paired by seed, since runs of one seed
have the same initial weights and the same batches.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from scipy.stats import t as student

from gpt.common.errors import UserError, nearest
from gpt.probes.verdict import verdict
from gpt.reports.runs import FinishedRun, distinguish, label

UNITS = {"val_loss": "nats a token", "val_bpb": "bits a byte"}


@dataclass(frozen=True)
class Baseline:
    """Cells are compared with the cell that has this value of this key and is equal otherwise."""

    key: str = "norm"
    value: str = "layer"

    def is_it(self, cell: Cell) -> bool:
        value = cell.value(self.key)
        with suppress(ValueError, TypeError):
            return float(value) == float(self.value)
        return self.value in (str(value), json.dumps(value, default=str))  # True or true


@dataclass(frozen=True)
class Cell:
    """Runs that differ only in their seed.

    traits  the settings in its label: those that tell it from most other cells (`runs.unsaid`)
    rates   the learning rates that were tried; `tuned` chose the cell's own among them
    unit    the loss in which cells are compared, a key of UNITS
    """

    traits: dict[str, Any]
    runs: list[FinishedRun]
    rates: tuple[float, ...] = ()
    unit: str = "val_loss"

    @property
    def label(self) -> str:
        return label(self.traits)

    def value(self, key: str) -> Any:
        """Its value of a setting, even if its label omits it; None if the setting is unknown."""
        return self.traits.get(key, self.runs[0].config.get(key))

    @property
    def setting(self) -> str:
        """Its label without the learning rate."""
        return label(without(self.traits, "optim.lr"))

    @property
    def norm(self) -> str:
        """The norm, with the options that its label shows."""
        swapped = ("norm", "init.swap_norm")
        return label({k: v for k, v in self.traits.items() if k.startswith(swapped)})

    @property
    def context(self) -> str:
        """Its label without the norm and the learning rate."""
        return label(without(self.traits, "optim.lr", "norm"))

    def sees(self, mode: str) -> list[str]:
        """What its tokens see besides their past in `mode`, "training" or "evaluation"."""
        return sorted({what for run in self.runs for what in run.summary[f"sees_in_{mode}"]})

    def marked(self, name: str) -> str:
        """`name` for a legend, with a mark if the cell leaks or may leak."""
        for mode in ("evaluation", "training"):
            if seen := self.sees(mode):
                return f"{name} ({verdict(seen)} in {mode})"
        return name

    @property
    def void(self) -> bool:
        """Whether evaluation leaks, or may leak, so that its losses are not results."""
        return bool(self.sees("evaluation"))

    @property
    def lr(self) -> float:
        """The peak learning rate; NaN if the configuration is missing."""
        return float(self.runs[0].config.get("optim.lr", math.nan))

    @property
    def ended(self) -> list[FinishedRun]:
        """Its runs that reached their last step with a finite validation loss."""
        return [r for r in self.runs if not r.diverged and r.summary["val_loss"] is not None]

    @property
    def losses(self) -> dict[int, float]:
        """Validation loss by seed, in its unit, of the runs in `ended`."""
        return {run.seed: run.summary[self.unit] for run in self.ended}

    @property
    def diverged(self) -> str:
        """For example "1 of 3 diverged"; empty if no run diverged."""
        lost = len(self.runs) - len(self.losses)
        return f"{lost} of {len(self.runs)} diverged" if lost else ""


def legend(cells: list[Cell]) -> str:
    """The name of the norm that the cells share. It is marked if all of them leak, and with "in
    part" if some do."""
    names = {cell.marked(cell.norm) for cell in cells}
    seen = [what for cell in cells for what in cell.sees("training") + cell.sees("evaluation")]
    return names.pop() if len(names) == 1 else f"{cells[0].norm} ({verdict(seen)} in part)"


def make_cells(runs: list[FinishedRun]) -> list[Cell]:
    """Runs that differ in nothing but the seed become one cell. Of runs that share the seed too,
    the first whose files are unchanged is taken, whatever its loss."""
    texts = {(run.summary["tokenizer"], run.summary["corpus_sha256"]) for run in runs}
    splits = {run.summary.get("train_bytes") for run in runs} - {None}  # each has its own tokenizer
    unit = "val_bpb" if max(len(texts), len(splits)) > 1 else "val_loss"
    grouped: dict[str, Cell] = {}
    seen: set[tuple[str, int]] = set()
    pairs = zip(runs, distinguish(runs), strict=True)
    for run, traits in sorted(pairs, key=lambda p: (p[0].seed, bool(p[0].changed), str(p[0].dir))):
        cell = Cell(without(traits, "seed"), [], unit=unit)
        if (cell.label, run.seed) not in seen:
            grouped.setdefault(cell.label, cell).runs.append(run)
            seen.add((cell.label, run.seed))
    return list(grouped.values())


def without(traits: dict[str, Any], *keys: str) -> dict[str, Any]:
    """`traits` without these keys and the options below them: `norm` removes `norm.eps` too."""
    swapped = ("init.swap_norm",) if "norm" in keys else ()
    below = tuple(f"{key}." for key in keys)
    gone = {*keys, *swapped}
    return {k: v for k, v in traits.items() if k not in gone and not k.startswith(below)}


def tuned(cells: list[Cell]) -> list[Cell]:
    """For each setting, the cell of the best learning rate: no norm loses by a rate that suits
    another norm.

    The best cell has the smallest share of diverged runs and, among these, the lowest mean
    validation loss over the seeds that all of them finished, or over its own if they share none.
    """
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(cell.setting, []).append(cell)
    return [
        replace(best_of(group), rates=tuple(sorted(cell.lr for cell in group)))
        for group in grouped.values()
    ]


def best_of(cells: list[Cell]) -> Cell:
    shares = [len(cell.losses) / len(cell.runs) for cell in cells]
    good = [cell for cell, share in zip(cells, shares, strict=True) if share == max(shares)]
    common = set.intersection(*(set(cell.losses) for cell in good))

    def mean(cell: Cell) -> float:
        losses = [cell.losses[seed] for seed in common] or list(cell.losses.values())
        return interval(losses)[0] if losses else math.inf

    return min(good, key=mean)


def interval(values: Iterable[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95% interval or None for a single value."""
    xs = list(values)
    mean = math.fsum(xs) / len(xs)
    if len(xs) < 2:
        return mean, None
    variance = math.fsum((x - mean) ** 2 for x in xs) / (len(xs) - 1)
    return mean, float(student.ppf(0.975, len(xs) - 1)) * math.sqrt(variance / len(xs))


def curve_limits(cells: list[Cell]) -> tuple[float, float]:
    """The limits of an axis for the cells' curves. Losses that are out of bounds, and those to
    which diverged runs rose, do not stretch it."""
    firsts: list[float] = []
    later: list[float] = []
    for cell in cells:
        for run in cell.runs:
            _, losses = run.curve(cell.unit)
            firsts += losses[:1]
            later += () if run.diverged else losses[1:]
    top = bound(cells)
    if all(loss > top for loss in later):  # the plot would be empty
        top = math.inf
    values = [loss for loss in firsts + later if loss <= top] or [0.0, 1.0]
    margin = 0.04 * (max(values) - min(values)) + 0.01
    return min(values) - margin, max(values) + margin


def bound(cells: list[Cell]) -> float:
    """Plot limit: twice the median initial loss. A loss above it is out of bounds."""
    curves = [run.curve(cell.unit)[1] for cell in cells for run in cell.runs]
    firsts = [losses[0] for losses in curves if losses]
    return 2 * median(firsts) if firsts else math.inf


def final_limits(cells: list[Cell], stretch: float = 1.0) -> tuple[float, float]:
    """The limits of an axis for the cells' final losses. Losses that are out of bounds do not
    stretch it. Intervals, which are huge for two seeds, add at most the share `stretch` of its
    length at either end."""
    top = bound(cells)
    points = [interval(cell.losses.values()) for cell in cells if cell.losses]
    points = [(mean, half) for mean, half in points if mean <= top] or points
    lowest, highest = min(mean for mean, _ in points), max(mean for mean, _ in points)
    room = stretch * (highest - lowest) + 0.01
    low = max(min(mean - (half or 0) for mean, half in points), lowest - room)
    high = min(max(mean + (half or 0) for mean, half in points), highest + room)
    margin = 0.05 * (high - low) + 0.005
    return low - margin, high + margin


def baseline(cell: Cell, cells: list[Cell], versus: Baseline) -> Cell | None:
    """The cell to compare `cell` with: at its best learning rate, equal in everything but the key.
    Cells whose norm has the same options (`unlike`) are preferred.

    None if there is no such cell, or more than one.
    """
    if versus.is_it(cell) or cell.void:
        return None

    def rest(c: Cell) -> str:
        return label(without(c.traits, "optim.lr", versus.key))

    found = [c for c in cells if versus.is_it(c) and not c.void and rest(c) == rest(cell)]
    found = [c for c in tuned(found) if not unlike(c, cell)] or tuned(found)
    return found[0] if len(found) == 1 else None


def choose_baseline(argument: str, cells: list[Cell]) -> Baseline:
    """The baseline of `baseline=KEY=VALUE`; UserError if no cell can be compared with it."""
    _, key, value = [*argument.split("=", 2), ""][:3]

    def serves(value: str) -> bool:
        return any(baseline(cell, cells, Baseline(key, value)) for cell in cells)

    if serves(value):
        return Baseline(key, value)
    values = [v for v in sorted({str(cell.value(key)) for cell in cells}) if serves(v)]
    keys = sorted({key for cell in cells for key in cell.traits})
    expected = f"KEY=VALUE with one of {', '.join(keys)}{nearest(key, keys)}"
    if values:
        expected = f"baseline={key}=VALUE with one of {', '.join(values)}"
    raise UserError(f"{argument}: nothing differs from it in that alone; expected {expected}")


def unlike(cell: Cell, other: Cell) -> list[str]:
    """The options that two different norms share but set differently, such as norm.eps."""
    a, b = cell.runs[0].config, other.runs[0].config
    if a.get("norm.name") == b.get("norm.name"):
        return []
    shared = sorted(k for k in a.keys() & b.keys() if k.startswith("norm.") and k != "norm.name")
    return [k for k in shared if a[k] != b[k]]


def difference(cell: Cell, other: Cell) -> tuple[float, float | None, int] | None:
    """The cell's validation loss minus the other's at the same seeds: the mean, half the width of
    its interval, and the number of pairs."""
    ours, theirs = cell.losses, other.losses
    pairs = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    return (*interval(pairs), len(pairs)) if pairs else None


def in_order(cells: list[Cell]) -> list[Cell]:
    """Sorted by context, then by norm. Settings that labels omit count too."""
    keys = dict.fromkeys(key for cell in cells for key in cell.traits)

    def place(cell: Cell) -> str:
        return label(without({key: cell.value(key) for key in keys}, "optim.lr", "norm"))

    places = ordered(place(cell) for cell in cells)
    return sorted(cells, key=lambda c: (places.index(place(c)), c.setting))


def ordered(names: Iterable[str]) -> list[str]:
    """Sorted with numbers by size: bs2 before bs16, 3e-4 before 0.001."""

    def key(name: str) -> list[tuple[float, str]]:
        pieces = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", name)
        return [(float(p), "") if i % 2 else (-1.0, p) for i, p in enumerate(pieces)]

    return sorted(names, key=key)
