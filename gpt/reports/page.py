"""A folder of runs as one page: what the numbers show, and what they do not."""

from __future__ import annotations

import html
import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from gpt.common.files import read_jsonl
from gpt.reports.cells import (
    UNITS,
    Baseline,
    Cell,
    Summary,
    curve,
    curve_limits,
    final_limits,
    in_order,
    interval,
    legend,
    tuned,
)
from gpt.reports.runs import read_config
from gpt.reports.tables import (
    MANY,
    activations,
    comparison,
    each_number,
    plain_words,
    to_csv,
    to_markdown,
)


def figure_losses(cells: list[Cell]) -> go.Figure | None:
    """Final validation loss with its 95% interval, a row for each context, a point a norm; the
    number at the edge where it is out of bounds."""
    shown = [c for c in in_order(cells) if c.losses and not c.void]
    if not shown:
        return None
    low, high = final_limits(shown)
    norms = sorted({c.norm for c in shown})
    figure = go.Figure()
    for norm in norms:
        mine = [c for c in shown if c.norm == norm]
        points = [(*interval(c.losses.values()), on_lines(c.context)) for c in mine]
        figure.add_scatter(
            x=[min(mean, high) for mean, _, _ in points],
            y=[context for _, _, context in points],
            error_x={"array": [half if mean <= high else None for mean, half, _ in points]},
            text=["" if mean <= high else f"{mean:.4g} →" for mean, _, _ in points],
            name=legend(mine),
        )
    figure.update_traces(
        mode="markers+text", textposition="middle left", orientation="h", marker_size=7
    )
    contexts = Counter(on_lines(c.context) for c in shown)
    figure.update_yaxes(categoryorder="array", categoryarray=list(contexts), autorange="reversed")
    figure.update_xaxes(range=(low, high))
    lines = max(*contexts.values(), *(name.count("<br>") + 1 for name in contexts)) + 1
    size = {"height": 180 + max(120, 15 * lines * len(contexts), 20 * len(norms))}
    title = "Final validation loss, 95% intervals over seeds"
    figure.update_layout(title=title, scattermode="group", xaxis_title=UNITS[shown[0].unit], **size)
    return figure


def on_lines(name: str) -> str:
    return "<br>".join(textwrap.wrap(name, 50))


def figure_curves(cells: list[Cell]) -> go.Figure:
    """Validation loss by step, every run; runs of one cell share a colour. A diverged one ends in a
    cross."""
    figure = go.Figure()
    for i, cell in enumerate(cells[:MANY]):
        for j, run in enumerate(cell.runs):
            steps, values = curve(run["run_dir"], cell.unit)
            color = f"hsl({360 * i / min(MANY, len(cells)):.0f} 65% 45%)"
            figure.add_scatter(
                x=steps,
                y=values,
                mode="lines+markers" if "diverged_at" in run else "lines",
                marker={"symbol": "x", "size": [0] * (len(steps) - 1) + [9]},
                name=on_lines(cell.marked(cell.label)),
                legendgroup=cell.label,
                showlegend=j == 0,
                line={"color": color},
            )
    figure.update_yaxes(range=curve_limits(cells[:MANY]))
    title = "Validation loss by step"
    figure.update_layout(title=title, xaxis_title="step", yaxis_title=UNITS[cells[0].unit])
    return figure


def figure_lr(cells: list[Cell]) -> go.Figure | None:
    """Validation loss by learning rate, where there are several: how much each norm minds it.

    A cross at the top where a run diverged: the mean beside it is that of the others.
    """
    shown = sorted((c for c in cells if not c.void and math.isfinite(c.lr)), key=lambda c: c.lr)
    settings = list(dict.fromkeys(c.setting for c in shown))
    if len(settings) == len(shown) or not any(c.losses for c in shown):
        return None
    low, high = final_limits(shown, stretch=0.1)
    margin = 0.1 * (high - low)
    figure = go.Figure()
    for i, setting in enumerate(settings):
        mine = [c for c in shown if c.setting == setting]
        points = [(c.lr, *interval(c.losses.values())) for c in mine if c.losses]
        xs, ys, errors = zip(*points, strict=True) if points else ((), (), ())
        style = {"name": on_lines(mine[0].marked(setting)), "legendgroup": setting}
        color = f"hsl({360 * i / len(settings):.0f} 65% 45%)"
        figure.add_scatter(x=xs, y=ys, error_y={"array": errors}, line={"color": color}, **style)
        lost = [c for c in mine if c.diverged]
        figure.add_scatter(
            x=[c.lr for c in lost],
            y=[high + margin] * len(lost),
            text=[c.diverged for c in lost],
            mode="markers",
            marker={"symbol": "x", "size": 9, "color": color},
            showlegend=False,
            **style,
        )
    figure.update_xaxes(type="log")
    figure.update_yaxes(range=[low, high + 2 * margin])
    title = "Final validation loss by peak learning rate"
    figure.update_layout(title=title, xaxis_title="optim.lr", yaxis_title=UNITS[shown[0].unit])
    return figure


def depth_maps(cells: list[Cell]) -> dict[str, dict[str, Any]]:
    """Every number in `stats.jsonl`, by name and cell, as a map of depth by step.

    {"residual: after/rms": {"layer-pre-bs4": {"x": steps, "y": depths, "z": lines by depth}}}, of
    each cell's lowest seed.
    """
    maps: dict[str, dict[str, Any]] = {}
    for cell in cells[:MANY]:
        rows = read_jsonl(Path(cell.runs[0]["run_dir"]) / "stats.jsonl")
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
    summaries: list[Summary],
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """By run, the keys that are not the same in all; and what is the same, a row a key."""
    configs = [read_config(s["run_dir"]) for s in summaries]
    keys = sorted({key for config in configs for key in config} - {"run_dir"})
    values = {key: [str(config.get(key, "–")) for config in configs] for key in keys}
    varied = [key for key in keys if len(set(values[key])) > 1]
    rows = [
        {"run": Path(s["run_dir"]).name} | {key: values[key][i] for key in varied}
        for i, s in enumerate(summaries)
    ]
    return rows, [{"key": k, "value": values[k][0]} for k in keys if k not in varied]


def to_html(rows: list[dict[str, str]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    head = line(rows[0], "th") if rows else ""
    return f"<table>{head}{''.join(line(row.values(), 'td') for row in rows)}</table>"


# Two maps side by side, of any statistic in any two cells, on one scale.
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
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1em } select { max-width: 100% }
"""


def folded(head: str, content: str) -> str:
    return f"<details><summary>{html.escape(head)}</summary>{content}</details>"


def curves(cells: list[Cell]) -> str:
    """Plotly's figures, its script with the first."""
    best = tuned(cells)
    figures = [figure_losses(best), figure_curves(best), figure_lr(cells)]
    plots = ""
    for figure in figures:
        if figure is not None:
            figure.update_layout(template="plotly_white")
            plots += figure.to_html(full_html=False, include_plotlyjs=not plots)
    return plots


def inside(cells: list[Cell], rows: list[dict[str, str]]) -> str:
    """What the statistics say, at the end and all the way; nothing where no run has any."""
    maps = depth_maps(cells)
    if not maps:
        return ""
    data = json.dumps(maps, separators=(",", ":"), sort_keys=True)
    data = data.replace("<", "\\u003c")  # a name cannot end the script
    return (
        f"<h2>Activations and attention at the last step recorded</h2>{to_html(rows)}"
        f"<h2>By depth and step</h2><script>const maps = {data};</script>{MAPS}"
    )


def results(rows: list[dict[str, str]]) -> str:
    """The table; what is not at its best learning rate stands folded below it."""
    best = [row for row in rows if row.get("best learning rate") != ""]
    others = [row for row in rows if row.get("best learning rate") == ""]
    return to_html(best) + (folded("At other learning rates", to_html(others)) if others else "")


def page(
    cells: list[Cell],
    title: str,
    lines: Sequence[str],
    rows: list[dict[str, str]],
    ends: list[dict[str, str]],
) -> str:
    """All of it as HTML that needs nothing but itself."""
    words = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    varied, same = differing([run for cell in cells for run in cell.runs])
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<h2>In words</h2><ul>{words}</ul>
<h2>Results</h2>{results(rows)}
<h2>Curves</h2>{curves(cells)}
{inside(tuned(cells), ends)}
<h2>Configurations</h2>
{folded(f"What differs between the runs ({len(varied)})", to_html(varied))}
{folded("What is the same in all", to_html(same))}
</body></html>
"""


def write(
    cells: list[Cell],
    folder: Path,
    title: str,
    versus: Baseline = Baseline(),  # noqa: B008, it is frozen
    notes: Sequence[str] = (),
) -> list[Path]:
    """`report.html`, and its tables as CSV and Markdown. notes: sentences to begin with."""
    rows, ends = comparison(cells, versus), activations(in_order(tuned(cells)))
    lines = [*notes, *plain_words(cells, versus)]
    contents = {
        "report.html": page(cells, title, lines, rows, ends),
        "table.csv": to_csv(rows),
        "table.md": to_markdown(rows) + "".join(f"\n{note}\n" for note in notes),
        "activations.csv": to_csv(ends),
        "activations.md": to_markdown(ends),
    }
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in contents]
