"""A folder of runs as one page: what the numbers show, and what they do not."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from gpt.cells import (
    Baseline,
    Cell,
    Summary,
    baseline,
    difference,
    in_order,
    interval,
    ordered,
    tuned,
)
from gpt.files import flatten, read_jsonl
from gpt.results import read_config

MANY = 40  # cells with curves and heat maps of their own; tables and intervals have them all

# Of the last row of `stats.jsonl`: a column's name, its group and key, and what of its depths.
ACTIVATIONS: tuple[tuple[str, str, str, Callable[[list[float]], float]], ...] = (
    ("stream rms at the embedding", "residual", "after/rms", itemgetter(0)),
    ("after the last block", "residual", "after/rms", itemgetter(-1)),
    ("its kurtosis", "residual", "after/kurtosis", itemgetter(-1)),
    ("its variance between features", "residual", "after/outliers", itemgetter(-1)),
    ("a block turns it by, least", "residual", "angle", min),
    ("largest attention logit", "attention", "max_logit", max),
    ("attention entropy, least", "attention", "entropy", min),
    ("log Z", "output", "log_z", max),
    ("tid_mean, largest", "sites", "tid_mean", max),
    ("tid_std, largest", "sites", "tid_std", max),
)


def show(value: float, half: float | None, digits: int = 4, sign: str = "") -> str:
    text = f"{value:{sign}.{digits}f}"
    return text if half is None else f"{text} ± {half:.{digits}f}"


def table(cells: list[Cell], versus: Baseline) -> list[dict[str, str]]:
    """One row a cell, best first; what is not a result comes last."""
    best = {cell.label for cell in tuned(cells)}
    rows = []
    for cell in cells:
        first, losses = cell.runs[0], cell.losses
        row = {"cell": cell.label, "seeds": f"{len(losses)} of {len(cell.runs)}"}
        if len(best) < len(cells):
            row["best learning rate"] = "yes" if cell.label in best else ""
        row["val loss"] = show(*interval(losses.values())) if losses else ""
        diverged = ", ".join(str(r["diverged_at"]) for r in cell.runs if "diverged_at" in r)
        if diverged:
            row["val loss"] += f"{' ' * bool(losses)}(diverged at step {diverged})"
        bpb = [r["val_bpb"] for r in cell.runs if "diverged_at" not in r and r["seed"] in losses]
        row["bits/byte"] = show(*interval(bpb)) if bpb else ""
        other = baseline(cell, cells, versus)
        paired = difference(cell, other) if other else None
        row[f"minus {versus.value}'s best"] = show(*paired[:2], sign="+") if paired else ""
        row["pairs"] = str(paired[2]) if paired else ""
        row["tokens/s"] = f"{interval(r['tokens_per_s'] for r in cell.runs)[0]:,.0f}"
        # The least: what a process keeps of cells before it, counts too.
        row["peak memory"] = f"{min(r['peak_memory'] for r in cell.runs) / 2**20:,.0f} MiB"
        row["parameters"] = f"{first['params']:,}"
        row["sees in training"] = " and ".join(first["sees_in_training"]) or "its past"
        row["sees in evaluation"] = " and ".join(first["sees_in_evaluation"]) or "its past"
        order = interval(bpb)[0] if bpb else 0.0
        rows.append((cell.leaky, not losses, order, row))
    return [row for *_, row in sorted(rows, key=lambda r: r[:3])]


def activations(cells: list[Cell]) -> list[dict[str, str]]:
    """What the statistics were at a cell's end, one row a cell: means over its seeds."""
    rows = []
    for cell in cells:
        stats = [read_jsonl(Path(run["run_dir"]) / "stats.jsonl") for run in cell.runs]
        ends = [lines[-1] for lines in stats if lines]
        row = {"cell": cell.label}
        for name, group, key, pick in ACTIVATIONS:
            depths = [[flatten(d, "/").get(key) for d in e.get(group, {}).values()] for e in ends]
            there = [[v for v in values if v is not None] for values in depths]
            picked = [pick(values) for values in there if values]
            row[name] = f"{interval(picked)[0]:.4g}" if picked else ""
        rows.append(row)
    return rows


def plain_words(cells: list[Cell], versus: Baseline) -> list[str]:
    """What the numbers show and what they do not, in sentences."""
    best = tuned(cells)
    lines = []
    whole = [c for c in best if len(c.losses) == len(c.runs) and not c.leaky]
    units = {(r["tokenizer"], r["corpus_sha256"]) for c in cells for r in c.runs}
    if len(units) > 1:
        lines.append("Tokenizers or texts differ: only bits a byte compare across them.")
    elif whole:
        first = min(whole, key=lambda c: interval(c.losses.values())[0])
        lowest = show(*interval(first.losses.values()))
        lines.append(f"The lowest validation loss is {first.label}'s: {lowest} nats a token.")
    if len(best) < len(cells):
        lines.append(
            "Each is compared at the learning rate that was best for it, chosen by these very "
            "losses, which flatters it a little."
        )
    alone = []
    for cell in in_order(best):
        other = baseline(cell, cells, versus)
        paired = difference(cell, other) if other else None
        if not paired or other is None:
            if not versus.is_it(cell) and not cell.leaky:
                alone.append(cell.label)
            continue
        mean, half, pairs = paired
        line = f"{cell.label} against {other.label}: {show(mean, half, sign='+')} nats"
        if half is None:
            line += ", of one seed: it may be chance."
        elif abs(mean) > half:
            line += f" over {pairs} seeds: {'worse' if mean > 0 else 'better'} beyond chance."
        else:
            line += f" over {pairs} seeds: no difference that these seeds can tell."
        if cell.rates != other.rates:
            line += f" Its rates were {len(cell.rates)}, the other's {len(other.rates)}: not alike."
        lines.append(line)
    if alone:
        lines.append(f"Without a {versus.key}={versus.value} to compare with: {', '.join(alone)}.")
    for end, word in ((0, "lowest"), (-1, "highest")):
        tried = [c for c in best if len(c.rates) > 1 and c.losses and not c.leaky]
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
    leaky = [c.label for c in cells if c.leaky]
    if leaky:
        lines.append(f"No result, for evaluation sees what it must not: {', '.join(leaky)}.")
    texts = sorted({f"{r['corpus']} ({r['corpus_sha256'][:8]})" for c in cells for r in c.runs})
    lines.append(
        f"All this is on {' and '.join(texts)}, for models of these sizes, trained for so many "
        "steps at these learning rates; each interval is for one comparison, and among twenty one "
        "may miss. Training losses of runs that see others are not compared at all."
    )
    return lines


def figure_losses(cells: list[Cell]) -> go.Figure:
    """Final validation loss, a panel for each context, a point a norm, with its interval."""
    shown = [c for c in cells if c.losses and not c.leaky]
    figure = go.Figure()
    for norm in sorted({c.norm for c in shown}):
        mine = [(c.context, *interval(c.losses.values())) for c in shown if c.norm == norm]
        contexts, means, halves = zip(*mine, strict=True)
        bars = {"array": list(halves)}
        figure.add_scatter(x=contexts, y=means, error_y=bars, mode="markers", name=norm)
    figure.update_xaxes(categoryorder="array", categoryarray=ordered({c.context for c in shown}))
    figure.update_traces(marker_size=9)
    title = "Final validation loss, 95% intervals over seeds"
    figure.update_layout(title=title, scattermode="group", yaxis_title="nats a token")
    return figure


def figure_curves(cells: list[Cell]) -> go.Figure:
    """Validation loss by step, every run; runs of one cell share a colour."""
    figure = go.Figure()
    for i, cell in enumerate(cells[:MANY]):
        for j, run in enumerate(cell.runs):
            rows = read_jsonl(Path(run["run_dir"]) / "metrics.jsonl")
            points = [(r["step"], r["val_loss"]) for r in rows if "val_loss" in r]
            color = f"hsl({360 * i / min(MANY, len(cells)):.0f} 65% 45%)"
            figure.add_scatter(
                x=[x for x, _ in points],
                y=[y for _, y in points],
                mode="lines",
                name=cell.label + " (leaky)" * cell.leaky,
                legendgroup=cell.label,
                showlegend=j == 0,
                line={"color": color},
            )
    title = "Validation loss by step"
    figure.update_layout(title=title, xaxis_title="step", yaxis_title="nats a token")
    return figure


def figure_lr(cells: list[Cell]) -> go.Figure | None:
    """Validation loss by learning rate, where there are several: how much each norm minds it."""
    lines: dict[str, list[tuple[float, float, float | None]]] = {}
    for cell in cells:
        if cell.losses and not cell.leaky and math.isfinite(cell.lr):
            point = (cell.lr, *interval(cell.losses.values()))
            lines.setdefault(cell.setting, []).append(point)
    if not any(len(points) > 1 for points in lines.values()):
        return None
    figure = go.Figure()
    for name, points in lines.items():
        xs, ys, errors = zip(*sorted(points, key=lambda p: p[0]), strict=True)
        figure.add_scatter(x=xs, y=ys, error_y={"array": errors}, name=name)
    figure.update_xaxes(type="log")
    title = "Final validation loss by peak learning rate"
    figure.update_layout(title=title, xaxis_title="optim.lr", yaxis_title="nats a token")
    return figure


def depth_maps(cells: list[Cell]) -> dict[str, dict[str, Any]]:
    """Every number in `stats.jsonl`, by name and cell, as a map of depth by step.

    {"residual: after/rms": {"layer-pre-bs4": {"x": steps, "y": depths, "z": lines by depth}}}, of
    each cell's lowest seed.
    """
    maps: dict[str, dict[str, Any]] = {}
    for cell in cells[:MANY]:
        rows = read_jsonl(Path(cell.runs[0]["run_dir"]) / "stats.jsonl")
        steps = [row["step"] for row in rows]
        for i, row in enumerate(rows):
            for group in row.keys() - {"step"}:
                for depth, entry in row[group].items():
                    for key, value in flatten(entry, "/").items():
                        if isinstance(value, list):
                            continue  # a histogram: one step alone would be a map
                        empty: dict[str, Any] = {"x": steps, "y": [], "z": []}
                        drawn = maps.setdefault(f"{group}: {key}", {}).setdefault(cell.label, empty)
                        if depth not in drawn["y"]:
                            drawn["y"].append(depth)
                            drawn["z"].append([None] * len(rows))
                        line = drawn["z"][drawn["y"].index(depth)]
                        line[i] = None if value is None else float(f"{value:.4g}")
    return maps


def differing(summaries: list[Summary]) -> tuple[list[str], list[list[str]], dict[str, Any]]:
    """The keys that are not the same in all runs, their values by run, and what is the same."""
    configs = [read_config(s["run_dir"]) for s in summaries]
    keys = sorted({key for config in configs for key in config} - {"run_dir"})
    values = {key: [config.get(key, "–") for config in configs] for key in keys}
    varied = [key for key in keys if any(v != values[key][0] for v in values[key])]
    rows = [[str(values[key][i]) for key in varied] for i in range(len(configs))]
    return varied, rows, {key: values[key][0] for key in keys if key not in varied}


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


def to_html(head: list[str], rows: list[list[str]]) -> str:
    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{row(head, 'th')}{''.join(row(r, 'td') for r in rows)}</table>"


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
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1em } select { max-width: 100% }
"""


def folded(head: str, content: str) -> str:
    return f"<details><summary>{html.escape(head)}</summary>{content}</details>"


def page(cells: list[Cell], title: str, versus: Baseline, notes: Sequence[str]) -> str:
    """All of it as HTML that needs nothing but itself, plotly's script included."""
    best, rows = tuned(cells), table(cells, versus)
    figures = [figure_losses(best), figure_curves(best), figure_lr(cells)]
    plots = ""
    for figure in figures:
        if figure is not None:
            figure.update_layout(template="plotly_white", height=460)
            plots += figure.to_html(full_html=False, include_plotlyjs=not plots)
    maps = json.dumps(depth_maps(best), separators=(",", ":"), sort_keys=True)
    maps = maps.replace("<", "\\u003c")  # a name cannot end the script
    values: dict[bool, list[list[str]]] = {True: [], False: []}
    for row in rows:
        values[row.get("best learning rate") != ""].append(list(row.values()))
    results = to_html(list(rows[0]), values[True])
    if values[False]:
        results += folded("At other learning rates", to_html(list(rows[0]), values[False]))
    inside = activations(in_order(best))
    inner = to_html(list(inside[0]), [list(row.values()) for row in inside])
    summaries = [run for cell in cells for run in cell.runs]
    varied, differences, same = differing(summaries)
    runs = [[Path(s["run_dir"]).name, *d] for s, d in zip(summaries, differences, strict=True)]
    common = [[key, str(value)] for key, value in same.items()]
    words = "".join(
        f"<li>{html.escape(line)}</li>" for line in [*notes, *plain_words(cells, versus)]
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<h2>In words</h2><ul>{words}</ul>
<h2>Results</h2>{results}
<h2>Curves</h2>{plots}
<h2>Activations and attention at the end</h2>{inner}
<h2>By depth and step</h2><script>const maps = {maps};</script>{MAPS}
<h2>Configurations</h2>
{folded(f"What differs between the {len(runs)} runs", to_html(["run", *varied], runs))}
{folded("What is the same in all", to_html(["key", "value"], common))}
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
    rows, inside = table(cells, versus), activations(in_order(tuned(cells)))
    contents = {
        "report.html": page(cells, title, versus, notes),
        "table.csv": to_csv(rows),
        "table.md": to_markdown(rows),
        "activations.csv": to_csv(inside),
        "activations.md": to_markdown(inside),
    }
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in contents]
