"""Runs that differ in their seed alone are one cell; cells are compared pair by pair.

Intervals are 95%, Student's t over seeds. Differences are paired by seed: the same initial weights
and the same batches.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from scipy.stats import t as student

from gpt.common.errors import UserError, nearest
from gpt.common.files import read_jsonl
from gpt.probes.verdict import verdict
from gpt.reports.runs import distinguish, label, read_config

Summary = dict[str, Any]
UNITS = {"val_loss": "nats a token", "val_bpb": "bits a byte"}


@dataclass(frozen=True)
class Baseline:
    """What cells are compared with: those with this value of this key, all else being equal."""

    key: str = "norm"
    value: str = "layer"

    def is_it(self, cell: Cell) -> bool:
        value = cell.value(self.key)
        with suppress(ValueError, TypeError):
            return float(value) == float(self.value)
        return self.value in (str(value), json.dumps(value, default=str))  # True or true


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seed alone.

    traits: what tells it from other cells, but for what most of them have (`results.unsaid`).
    rates: the learning rates that were tried, of which `tuned` took its own. unit: the loss that
    compares with other cells', one of UNITS.
    """

    traits: dict[str, Any]
    runs: list[Summary]
    rates: tuple[float, ...] = ()
    unit: str = "val_loss"

    @property
    def label(self) -> str:
        return label(self.traits)

    def value(self, key: str) -> Any:
        """What it has there, also where its label leaves it unsaid; None where nothing."""
        return self.traits.get(key, read_config(self.runs[0]["run_dir"]).get(key))

    @property
    def setting(self) -> str:
        """Its label, whatever its learning rate."""
        return label(without(self.traits, "optim.lr"))

    @property
    def norm(self) -> str:
        """The norm, with those of its options that are not the usual ones."""
        swapped = ("norm", "init.swap_norm")
        return label({k: v for k, v in self.traits.items() if k.startswith(swapped)})

    @property
    def context(self) -> str:
        """Its label, whatever its norm and its learning rate."""
        return label(without(self.traits, "optim.lr", "norm"))

    def sees(self, mode: str) -> list[str]:
        """What its tokens see beside their past, in `mode`: "training" or "evaluation"."""
        return sorted({what for run in self.runs for what in run[f"sees_in_{mode}"]})

    def marked(self, name: str) -> str:
        """`name` for a legend: with a mark where it sees what it must not, or may."""
        for mode in ("evaluation", "training"):
            if seen := self.sees(mode):
                return f"{name} ({verdict(seen)} in {mode})"
        return name

    @property
    def void(self) -> bool:
        """Whether evaluation sees what it must not, or may: its losses are no results."""
        return bool(self.sees("evaluation"))

    @property
    def lr(self) -> float:
        """The peak learning rate; NaN where the configuration is not there."""
        return float(read_config(self.runs[0]["run_dir"]).get("optim.lr", math.nan))

    @property
    def losses(self) -> dict[int, float]:
        """Validation loss by seed, in its unit, of runs that came to an end."""
        good = [r for r in self.runs if "diverged_at" not in r and r["val_loss"] is not None]
        return {r["seed"]: r[self.unit] for r in good}

    @property
    def diverged(self) -> str:
        """How many of its runs came to no end; empty where all did."""
        lost = len(self.runs) - len(self.losses)
        return f"{lost} of {len(self.runs)} diverged" if lost else ""


def legend(cells: list[Cell]) -> str:
    """The name of the norm that they share, with a mark where all or some of them have one."""
    names = {cell.marked(cell.norm) for cell in cells}
    seen = [what for cell in cells for what in cell.sees("training") + cell.sees("evaluation")]
    return names.pop() if len(names) == 1 else f"{cells[0].norm} ({verdict(seen)} in part)"


def make_cells(summaries: list[Summary]) -> list[Cell]:
    """Of runs that are equal in all, the seed too, one is taken, whatever its loss."""
    texts = {(s["tokenizer"], s["corpus_sha256"]) for s in summaries}
    splits = {s.get("train_bytes") for s in summaries} - {None}  # each trains its own tokenizer
    unit = "val_bpb" if max(len(texts), len(splits)) > 1 else "val_loss"
    grouped: dict[str, Cell] = {}
    seen: set[tuple[str, int]] = set()
    pairs = zip(summaries, distinguish(summaries), strict=True)
    for summary, traits in sorted(pairs, key=lambda p: (p[0]["seed"], p[0]["run_dir"])):
        cell = Cell(without(traits, "seed"), [], unit=unit)
        if (cell.label, summary["seed"]) not in seen:
            grouped.setdefault(cell.label, cell).runs.append(summary)
            seen.add((cell.label, summary["seed"]))
    return list(grouped.values())


def without(traits: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Less these keys and the options below them: `norm` takes `norm.eps` along."""
    swapped = ("init.swap_norm",) if "norm" in keys else ()
    below = tuple(f"{key}." for key in keys)
    gone = {*keys, *swapped}
    return {k: v for k, v in traits.items() if k not in gone and not k.startswith(below)}


def tuned(cells: list[Cell]) -> list[Cell]:
    """Of the cells that differ in `optim.lr` alone the best, so that none loses for another's rate.

    The best has the fewest diverged runs, and of such the lowest mean validation loss, over the
    seeds at which all of them came to an end, if there are any.
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
    """Mean and half the width of its 95% interval; None for a single value."""
    xs = list(values)
    mean = math.fsum(xs) / len(xs)
    if len(xs) < 2:
        return mean, None
    variance = math.fsum((x - mean) ** 2 for x in xs) / (len(xs) - 1)
    return mean, float(student.ppf(0.975, len(xs) - 1)) * math.sqrt(variance / len(xs))


@cache
def curve(run_dir: str, unit: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """A run's steps and its validation losses there, in one of UNITS, while they were finite."""
    rows = read_jsonl(Path(run_dir) / "metrics.jsonl")
    points = [(r["step"], r[unit]) for r in rows if r.get(unit) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return steps, values


def curve_limits(cells: list[Cell]) -> tuple[float, float]:
    """An axis for their curves, without what is out of bounds, and without what a diverged run
    rose to."""
    firsts: list[float] = []
    later: list[float] = []
    for cell in cells:
        for run in cell.runs:
            losses = curve(run["run_dir"], cell.unit)[1]
            firsts += losses[:1]
            later += () if "diverged_at" in run else losses[1:]
    top = bound(cells)
    if all(loss > top for loss in later):  # it would be a picture of nothing
        top = math.inf
    values = [loss for loss in firsts + later if loss <= top] or [0.0, 1.0]
    margin = 0.04 * (max(values) - min(values)) + 0.01
    return min(values) - margin, max(values) + margin


def bound(cells: list[Cell]) -> float:
    """Plot limit: twice the median initial loss. A loss above it is out of bounds."""
    curves = [curve(run["run_dir"], cell.unit)[1] for cell in cells for run in cell.runs]
    firsts = [losses[0] for losses in curves if losses]
    return 2 * median(firsts) if firsts else math.inf


def final_limits(cells: list[Cell], stretch: float = 1.0) -> tuple[float, float]:
    """An axis for their final losses, without what is out of bounds. Intervals lengthen it by
    `stretch` of itself at either end at most: a few seeds' may be endless."""
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
    """The cell to compare with, at its best learning rate, that differs in nothing but the key: of
    those whose norm has the same eps and the like, if there are any.

    None where there is none, or several.
    """
    if versus.is_it(cell) or cell.void:
        return None

    def rest(c: Cell) -> str:
        return label(without(c.traits, "optim.lr", versus.key))

    found = [c for c in cells if versus.is_it(c) and not c.void and rest(c) == rest(cell)]
    found = [c for c in tuned(found) if not unlike(c, cell)] or tuned(found)
    return found[0] if len(found) == 1 else None


def choose_baseline(argument: str, cells: list[Cell]) -> Baseline:
    """That of `baseline=KEY=VALUE`; UserError where no cell can be compared with it."""
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
    """Of two norms the options that both have, with different values: norm.eps and the like."""
    a, b = (read_config(c.runs[0]["run_dir"]) for c in (cell, other))
    if a.get("norm.name") == b.get("norm.name"):
        return []
    shared = sorted(k for k in a.keys() & b.keys() if k.startswith("norm.") and k != "norm.name")
    return [k for k in shared if a[k] != b[k]]


def difference(cell: Cell, other: Cell) -> tuple[float, float | None, int] | None:
    """Its validation loss minus the other's at the same seeds: mean, half width, pairs."""
    ours, theirs = cell.losses, other.losses
    pairs = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    return (*interval(pairs), len(pairs)) if pairs else None


def in_order(cells: list[Cell]) -> list[Cell]:
    """By what they share with other norms, also where it is unsaid, then by norm."""
    keys = dict.fromkeys(key for cell in cells for key in cell.traits)

    def place(cell: Cell) -> str:
        return label(without({key: cell.value(key) for key in keys}, "optim.lr", "norm"))

    places = ordered(place(cell) for cell in cells)
    return sorted(cells, key=lambda c: (places.index(place(c)), c.setting))


def ordered(names: Iterable[str]) -> list[str]:
    """Sorted, numbers by their size: bs2 before bs16, 3e-4 before 0.001."""

    def key(name: str) -> list[tuple[float, str]]:
        pieces = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", name)
        return [(float(p), "") if i % 2 else (-1.0, p) for i, p in enumerate(pieces)]

    return sorted(names, key=key)
