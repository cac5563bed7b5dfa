"""A folder of runs as one HTML page: what the numbers show, and what they do not show."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from gpt.common.files import write_atomically
from gpt.reports.cells import Baseline, Cell, in_order, tuned
from gpt.reports.runs import FinishedRun
from gpt.reports.tables import (
    MANY,
    activations,
    comparison,
    each_number,
    plain_words,
    to_csv,
    to_markdown,
)


def depth_maps(cells: list[Cell]) -> dict[str, dict[str, Any]]:
    """Every number in `stats.jsonl`, by name and cell, as a map of depth by step:
    {"residual: after/rms": {"layer-pre-bs4": {"x": steps, "y": depths, "z": lines by depth}}}.

    A cell is shown by the run of its lowest seed.
    """
    maps: dict[str, dict[str, Any]] = {}
    for cell in cells[:MANY]:
        rows = cell.runs[0].stats
        lines: dict[str, dict[str, list[float | None]]] = {}
        for i, row in enumerate(rows):
            for name, depth, value in each_number(row):
                line = lines.setdefault(name, {}).setdefault(depth, [None] * len(rows))
                line[i] = None if value is None else float(f"{value:.4g}")
        steps = [row["step"] for row in rows]
        for name, by_depth in lines.items():
            drawn = {"x": steps, "y": list(by_depth), "z": list(by_depth.values())}
            maps.setdefault(name, {})[cell.label] = drawn
    return maps


def differing(
    runs: list[FinishedRun],
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Two tables: a row for each run with the settings that differ between runs, and a row for each
    setting that all of them share."""
    keys = sorted({key for run in runs for key in run.config} - {"run_dir"})
    values = {key: [str(run.config.get(key, "–")) for run in runs] for key in keys}
    varied = [key for key in keys if len(set(values[key])) > 1]
    rows = [
        {"run": run.dir.name} | {key: values[key][i] for key in varied}
        for i, run in enumerate(runs)
    ]
    return rows, [{"key": k, "value": values[k][0]} for k in keys if k not in varied]


def to_html(rows: list[dict[str, str]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    head = line(rows[0], "th") if rows else ""
    return f"<table>{head}{''.join(line(row.values(), 'td') for row in rows)}</table>"


# Two maps side by side: one statistic in two cells, on one scale.
MAPS = """
<p><select id="statistic"></select> <label><input type="checkbox" id="log"> log₁₀</label></p>
<div class="pair"><div><select class="cell"></select><div class="map"></div></div>
<div><select class="cell"></select><div class="map"></div></div></div>
<script>
const statistic = document.getElementById("statistic"), log = document.getElementById("log");
const cells = [...document.querySelectorAll(".cell")], places = document.querySelectorAll(".map");
const fill = (select, names) => select.replaceChildren(...names.map(name => new Option(name)));
const least = all => all.reduce((a, b) => Math.min(a, b), Infinity);
const most = all => all.reduce((a, b) => Math.max(a, b), -Infinity);
const numbers = z => z.flat().filter(v => v !== null);
function choose() {
  const chosen = cells.map(cell => cell.value), names = Object.keys(maps[statistic.value]);
  cells.forEach((cell, i) => {
    fill(cell, names);
    cell.value = names.includes(chosen[i]) ? chosen[i] : names[Math.min(i, names.length - 1)];
  });
  const all = names.flatMap(name => numbers(maps[statistic.value][name].z));
  const low = least(all), high = most(all);
  log.checked = low > 0 && high > 30 * low;
  draw();
}
function draw() {
  const scale = v => v === null ? null : !log.checked ? v : v > 0 ? Math.log10(v) : null;
  const shown = cells.map(cell => maps[statistic.value][cell.value]);
  const zs = shown.map(map => map.z.map(line => line.map(scale))), all = zs.flatMap(numbers);
  shown.forEach((map, i) => Plotly.react(places[i], [{
    type: "heatmap", x: map.x, y: map.y, z: zs[i], colorscale: "Viridis",
    zmin: least(all), zmax: most(all),
  }], {height: 420, margin: {t: 20, l: 90}, xaxis: {title: {text: "step"}}}, {responsive: true}));
}
fill(statistic, Object.keys(maps));
statistic.onchange = choose; log.onchange = draw; cells.forEach(cell => cell.onchange = draw);
if (maps["residual: after/rms"]) statistic.value = "residual: after/rms";
if (statistic.value) choose();
</script>
"""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .3em .7em; text-align: left; white-space: nowrap }
td:first-child { white-space: normal; min-width: 17em }
svg { max-width: 100%; height: auto; display: block } .map svg { max-width: none }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1em } select { max-width: 100% }
"""


def folded(head: str, content: str) -> str:
    return f"<details><summary>{html.escape(head)}</summary>{content}</details>"


def inside(cells: list[Cell], rows: list[dict[str, str]]) -> str:
    """The statistics at the end, and as maps; "" if no run recorded any."""
    maps = depth_maps(cells)
    if not maps:
        return ""
    data = json.dumps(maps, separators=(",", ":"), sort_keys=True)
    data = data.replace("<", "\\u003c")  # a name cannot end the script
    return (
        f"<h2>Activations and attention at the last step recorded</h2>{to_html(rows)}"
        f"<h2>By depth and step</h2><script>{get_plotlyjs()}</script>"
        f"<script>const maps = {data};</script>{MAPS}"
    )


def results(rows: list[dict[str, str]]) -> str:
    """The table. Rows that are not at their best learning rate are folded away below it."""
    best = [row for row in rows if row.get("best learning rate") != ""]
    others = [row for row in rows if row.get("best learning rate") == ""]
    return to_html(best) + (folded("At other learning rates", to_html(others)) if others else "")


def page(
    cells: list[Cell],
    title: str,
    lines: Sequence[str],
    rows: list[dict[str, str]],
    ends: list[dict[str, str]],
    svgs: Sequence[str],
) -> str:
    """The whole page, as one file that loads nothing."""
    words = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    varied, same = differing([run for cell in cells for run in cell.runs])
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<h2>In words</h2><ul>{words}</ul>
<h2>Results</h2>{results(rows)}
<h2>Plots</h2>{"".join(svgs)}
{inside(tuned(cells), ends)}
<h2>Configurations</h2>
{folded(f"What differs between the runs ({len(varied)})", to_html(varied))}
{folded("What all runs share", to_html(same))}
</body></html>
"""


def write(
    cells: list[Cell],
    folder: Path,
    title: str,
    versus: Baseline = Baseline(),  # noqa: B008, it is frozen
    notes: Sequence[str] = (),
    svgs: Sequence[str] = (),
) -> list[Path]:
    """Write `report.html`, and its tables as CSV and Markdown.

    notes  sentences that come first
    svgs   the plots
    """
    rows, ends = comparison(cells, versus), activations(in_order(tuned(cells)))
    lines = [*notes, *plain_words(cells, versus)]
    contents = {
        "report.html": page(cells, title, lines, rows, ends, svgs),
        "table.csv": to_csv(rows),
        "table.md": to_markdown(rows) + "".join(f"\n{note}\n" for note in notes),
        "activations.csv": to_csv(ends),
        "activations.md": to_markdown(ends),
    }
    for name, text in contents.items():
        write_atomically(folder / name, text)  # it replaces a link, and never writes through it
    return [folder / name for name in contents]
