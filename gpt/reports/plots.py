"""Plots: final losses, curves, learning rates, and the residual stream by depth and step.

Each is drawn once, by matplotlib, and stands as SVG in the page and as a PNG beside it.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # draw to files: there may be no screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from gpt.common.files import naming
from gpt.reports.cells import (
    UNITS,
    Cell,
    curve_limits,
    final_limits,
    in_order,
    interval,
    legend,
    tuned,
)

COLUMNS = 3  # panels beside one another
MAPS = 24  # at most so many cells have a map


def draw(cells: list[Cell]) -> dict[str, Figure]:
    """The figures that the cells have data for: losses, curves, depth, and lr if several learning
    rates were tried. Cells whose evaluation leaks are left out."""
    cells = [cell for cell in cells if not cell.void]
    if not cells:
        return {}
    best = tuned(cells)
    figures = {
        "losses": draw_losses(best),
        "curves": draw_curves(best),
        "lr": draw_lr(cells),
        "depth": draw_depth(best),
    }
    plt.close("all")  # pyplot forgets the figures; they can still be saved
    return {name: figure for name, figure in figures.items() if figure is not None}


def save(figures: dict[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as a PNG."""
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        with naming(paths[-1]):
            paths[-1].unlink(missing_ok=True)  # never write through a link
            figure.savefig(paths[-1], dpi=130)
    return paths


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element for a page; equal runs give equal text."""
    file = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "gpt-norms"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :]


def draw_losses(cells: list[Cell]) -> Figure | None:
    """Final validation loss with its 95% interval over seeds, a line for each cell. A loss that is
    out of bounds stands as a number at the edge."""
    cells = [cell for cell in in_order(cells) if cell.losses]
    if not cells:
        return None
    ys, middles, end = line_up(cells)
    styles = norm_styles(cells)
    names = {n: wrapped(legend([c for c in cells if c.norm == n])) for n in styles}
    lines = max(end, sum(height(name) + 0.5 for name in names.values()), 10)
    characters = longest(names.values()) + longest(middles)
    size = (4.5 + 0.08 * characters, 0.8 + 0.17 * lines)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    low, high = final_limits(cells)
    for i, (norm, style) in enumerate(styles.items()):
        mine = [cell for cell in cells if cell.norm == norm]
        means, halves = zip(*(interval(c.losses.values()) for c in mine), strict=True)
        errors = [math.nan if half is None else half for half in halves]
        rows = [ys[cell.label] for cell in mine]
        look = {"fmt": "os^D"[i // 10 % 4], "markersize": 4, "capsize": 3, "color": style["color"]}
        axis.errorbar(means, rows, xerr=errors, label=names[norm], **look)
        for mean, y in zip(means, rows, strict=True):
            if mean > high:
                axis.text(high, y, f"{mean:.4g} → ", ha="right", va="center", color=style["color"])
    axis.set_xlim(low, high)
    axis.set_yticks(list(middles.values()), list(middles))
    axis.set_ylim(end, 0)
    axis.set_xlabel(f"validation loss, {UNITS[cells[0].unit]}")
    tidy(axis)
    figure.legend(frameon=False, loc="outside right center")
    return figure


def line_up(cells: list[Cell]) -> tuple[dict[str, float], dict[str, float], float]:
    """Heights in lines, counted from the top: that of each cell by its label, the middle of each
    context by the name that is written there, and the end."""
    ys: dict[str, float] = {}
    middles: dict[str, float] = {}
    end = 0
    for context, group in groupby(cells, key=lambda c: c.context):
        labels, name = [cell.label for cell in group], wrapped(context, 40)
        room = max(len(labels), height(name)) + 1
        middles[name] = end + room / 2
        first = middles[name] - (len(labels) - 1) / 2
        ys |= {label: first + i for i, label in enumerate(labels)}
        end += room
    return ys, middles, end


def draw_curves(cells: list[Cell]) -> Figure:
    """Validation loss by step, a line for each run. A diverged run ends in a cross."""
    figure, panels, styles = panels_by_context(cells)
    for cell in cells:
        for run in cell.runs:
            steps, values = run.curve(cell.unit)
            axis, style = panels[cell.context], styles[cell.norm]
            axis.plot(steps, values, label=name_of(cell), linewidth=1.6, **style)
            if run.diverged:
                axis.plot(steps[-1:], values[-1:], "x", color=style["color"])
    figure.axes[0].set_ylim(curve_limits(cells))
    finish(figure, panels, "step", f"validation loss, {UNITS[cells[0].unit]}")
    return figure


def draw_lr(cells: list[Cell]) -> Figure | None:
    """Final validation loss by peak learning rate, with 95% intervals over seeds. A cross at the
    top marks a rate at which a run diverged."""
    cells = sorted((cell for cell in cells if cell.lr > 0), key=lambda c: c.lr)
    if len({cell.lr for cell in cells}) < 2 or not any(cell.losses for cell in cells):
        return None
    figure, panels, styles = panels_by_context(cells)
    for setting in dict.fromkeys(cell.setting for cell in cells):
        mine = [cell for cell in cells if cell.setting == setting]
        axis, style = panels[mine[0].context], styles[mine[0].norm]
        ended = [(c.lr, *interval(c.losses.values())) for c in mine if c.losses]
        lrs, means, halves = zip(*ended, strict=True) if ended else ((), (), ())
        errors = [math.nan if h is None else h for h in halves]
        axis.errorbar(
            lrs, means, errors, marker="o", markersize=3, capsize=3, **style, label=name_of(mine[0])
        )
        lost = [c.lr for c in mine if c.diverged]
        height = 0.96 - 0.06 * list(styles).index(mine[0].norm)
        top = axis.get_xaxis_transform()
        axis.plot(lost, [height] * len(lost), "x", color=style["color"], transform=top)
    for axis in panels.values():
        axis.set_ylim(final_limits(cells, stretch=0.1))
        axis.set_xscale("log")
        axis.set_xticks(sorted({c.lr for c in cells}), minor=False)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    finish(figure, panels, "peak learning rate", f"validation loss, {UNITS[cells[0].unit]}")
    return figure


def draw_depth(cells: list[Cell]) -> Figure | None:
    """The residual stream's root mean square by depth and step, of each cell's lowest seed."""
    maps: list[tuple[Cell, list[int], list[str], Any]] = []
    for cell in in_order(cells)[:MAPS]:
        rows = [row for row in cell.runs[0].stats if "residual" in row]
        if rows:
            depths = list(rows[0]["residual"])
            values = [[row["residual"][d]["after"]["rms"] for row in rows] for d in depths]
            with np.errstate(divide="ignore"):
                z = np.log10(np.array(values, float))
            maps.append((cell, [row["step"] for row in rows], depths, np.where(z > -9, z, np.nan)))
    if not maps:
        return None
    low = min(np.nanmin(z) for *_, z in maps)
    high = max(np.nanmax(z) for *_, z in maps)
    columns = min(4, len(maps))
    lines = -(-len(maps) // columns)
    titles = max(height(wrapped(cell.label)) for cell, *_ in maps)
    size = (3.2 * columns, (1.7 + 0.16 * titles) * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(maps) :]:
        axis.set_visible(False)
    for axis, (cell, steps, depths, z) in zip(axes.flat, maps, strict=False):
        drawn = axis.imshow(z, vmin=low, vmax=high, aspect="auto", origin="lower")
        axis.set_title(wrapped(cell.label), fontsize=8)
        shown = range(0, len(depths), -(-len(depths) // 6))
        axis.set_yticks(list(shown), [depths[i] for i in shown], fontsize=7)
        ends = [0, len(steps) - 1]
        axis.set_xticks(ends, [f"step {steps[i]}" for i in ends], fontsize=7)
    figure.colorbar(drawn, ax=axes, label="log₁₀ of the stream's rms")
    return figure


def norm_styles(cells: list[Cell]) -> dict[str, dict[str, Any]]:
    """A colour and a stroke for each norm, so that lines that coincide can be told apart."""
    norms = sorted({cell.norm for cell in cells})
    strokes = ["-", "--", "-.", ":"]
    return {n: {"color": f"C{i % 10}", "linestyle": strokes[i % 4]} for i, n in enumerate(norms)}


def panels_by_context(
    cells: list[Cell],
) -> tuple[Figure, dict[str, Axes], dict[str, dict[str, Any]]]:
    """A figure with a panel for each context, and the norms' styles."""
    contexts = list(dict.fromkeys(cell.context for cell in in_order(cells)))
    columns = min(COLUMNS, len(contexts))
    lines = -(-len(contexts) // columns)
    titles = max(height(wrapped(context)) for context in contexts)
    size = (4.2 * columns + 0.6, (2.5 + 0.2 * titles) * lines + 0.5)
    figure, axes = plt.subplots(
        lines, columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(contexts) :]:
        axis.set_visible(False)
    return figure, dict(zip(contexts, axes.flat, strict=False)), norm_styles(cells)


def finish(figure: Figure, panels: dict[str, Axes], x: str, y: str) -> None:
    for context, axis in panels.items():
        axis.set_title(wrapped(context), fontsize=10)
        tidy(axis)
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    found = [axis.get_legend_handles_labels() for axis in panels.values()]
    labels = {t: h for handles, texts in found for h, t in zip(handles, texts, strict=True)}
    figure.legend(labels.values(), labels.keys(), frameon=False, loc="outside right center")


def name_of(cell: Cell) -> str:
    return wrapped(cell.marked(cell.norm))


def wrapped(label: str, width: int = 26) -> str:
    """A label on several lines. A $ in it, which may come from a path, does not start TeX."""
    return textwrap.fill(label, width).replace("$", r"\$")


def height(name: str) -> int:
    return name.count("\n") + 1


def longest(names: Iterable[str]) -> int:
    """The length of their longest line."""
    return max(len(line) for name in names for line in name.split("\n"))


def tidy(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
