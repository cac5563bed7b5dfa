"""Plots: what they show, what they must not show, and that it fits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gpt.probes.verdict import FUTURE, UNKNOWN
from gpt.reports import plots, tables
from gpt.reports.cells import (
    Baseline,
    curve_limits,
    final_limits,
    interval,
    make_cells,
    tuned,
)
from gpt.reports.runs import load_runs, print_table
from tests.tools.made_runs import summary
from tests.tools.programs import run_program


def test_a_rate_at_which_runs_diverged_is_marked_as_such(tmp_path: Path) -> None:
    """Otherwise the survivors' mean would look normal, and a rate with none would be missing."""
    for lr, diverged in ((0.1, ()), (0.3, (2,)), (1.0, (1, 2))):
        for seed in (1, 2):
            folder = tmp_path / str(lr)
            lost = {"diverged_at": 5} if seed in diverged else {}
            summary(folder, "layer", seed, 3.0 + seed / 10, {"optim.lr": lr}, **lost)
    cells = make_cells(load_runs(tmp_path))
    drawn = plots.draw_lr(cells)
    assert drawn is not None
    (line, *_), *_ = drawn.axes[0].containers
    assert list(line.get_xdata()) == [0.1, 0.3]
    marks = [mark for mark in drawn.axes[0].lines if mark.get_marker() == "x"]
    assert [list(mark.get_xdata()) for mark in marks] == [[0.3, 1.0]]
    assert plots.draw_lr([cell for cell in cells if not cell.losses]) is None


def test_a_leaky_norm_is_in_no_plot(tmp_path: Path) -> None:
    for lr in (0.1, 0.3):
        for norm, seen in (("layer", []), ("batch", ["later tokens"])):
            summary(tmp_path / str(lr), norm, 1, 3.0, {"optim.lr": lr}, sees_in_evaluation=seen)
    figures = plots.draw(make_cells(load_runs(tmp_path)))
    assert list(figures) == ["losses", "curves", "lr", "depth"]
    for name in ("losses", "curves", "lr"):
        assert {text.get_text() for text in figures[name].legends[0].get_texts()} == {"layer"}
    assert "layer" in figures["depth"].axes[0].get_title()


def test_a_curve_that_diverges_ends_in_a_cross(tmp_path: Path) -> None:
    summary(tmp_path, "layer", 1, 3.0)
    summary(tmp_path, "rms", 1, None, diverged_at=12)
    lines = plots.draw_curves(make_cells(load_runs(tmp_path))).axes[0].lines
    layer, rms, cross = sorted(lines, key=lambda line: (line.get_marker() == "x", line.get_label()))
    assert (layer.get_label(), rms.get_label()) == ("layer", "rms")
    assert list(layer.get_ydata()) == pytest.approx([4.0, 3 + 1 / 6, 3 + 1 / 11])
    assert cross.get_color() == rms.get_color()
    assert list(cross.get_xdata()) == [10]
    assert list(cross.get_ydata()) == list(rms.get_ydata())[-1:]


def test_the_page_s_plots_are_the_pngs(folder: Path) -> None:
    """The same text for equal runs, so that a report can be compared with the one before."""
    cells = make_cells(load_runs(folder))
    first, second = (list(map(plots.to_svg, plots.draw(cells).values())) for _ in range(2))
    assert first == second
    assert len(first) == 3
    assert all(svg.startswith("<svg") for svg in first)


@pytest.mark.parametrize(
    ("sha256", "unit", "last"), [("0", "nats a token", 3.0), ("1", "bits a byte", 1.5)]
)
def test_curves_are_in_the_unit_of_the_tables(
    sha256: str, unit: str, last: float, tmp_path: Path
) -> None:
    summary(tmp_path, "layer", 1, 3.0)
    summary(tmp_path, "rms", 1, 4.0, corpus_sha256=sha256 * 64)
    cells = make_cells(load_runs(tmp_path))
    figure = plots.draw_curves(cells)
    assert unit in figure.get_supylabel()
    lines = {line.get_label(): line for axis in figure.axes for line in axis.lines}
    assert list(lines["layer"].get_ydata())[-1] == pytest.approx(last, abs=0.1)


def test_the_pictures_are_of_the_best_learning_rates_and_of_no_leak(folder: Path) -> None:
    cells = make_cells(load_runs(folder))
    paths = plots.save(plots.draw(cells), folder)
    assert [p.name for p in paths] == ["losses.png", "curves.png", "depth.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    figure = plots.draw_losses(tuned([c for c in cells if not c.void]))
    assert figure is not None
    bars = {c.get_label(): c for c in figure.axes[0].containers}
    assert set(bars) == {"dummy", "layer", "rms"}  # instance leaks, scale diverged
    (point, _, (error,)) = bars["layer"]  # type: ignore[misc]
    assert point.get_xdata()[0] == pytest.approx(3.2)
    low, high = error.get_segments()[0][:, 0]
    assert (high - low) / 2 == pytest.approx(4.302653 * 0.2 / math.sqrt(3), rel=1e-6)


def test_a_loss_without_bound_does_not_squeeze_the_others(tmp_path: Path) -> None:
    for norm, loss in (("layer", 3.0), ("rms", 12.0), ("dummy", 35181.0)):
        summary(tmp_path, norm, 1, loss)
        curve = [{"step": 0, "val_loss": 7.0}, {"step": 9, "val_loss": loss}]
        path = tmp_path / f"{norm}-pre-bs4-s1" / "metrics.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in curve))
    cells = make_cells(load_runs(tmp_path))
    assert curve_limits(cells) == pytest.approx((2.6, 12.4), abs=0.1)
    assert final_limits(cells) == pytest.approx((2.5, 12.5), abs=0.1)
    figure = plots.draw_losses(cells)
    assert figure is not None
    assert figure.axes[0].get_xlim() == final_limits(cells)
    (text,) = figure.axes[0].texts
    assert text.get_text() == "3.518e+04 → "
    assert text.get_position()[0] == final_limits(cells)[1]


def test_where_all_losses_are_out_of_bounds_they_are_shown(tmp_path: Path) -> None:
    summary(tmp_path, "layer", 1, 300.0)
    path = tmp_path / "layer-pre-bs4-s1" / "metrics.jsonl"
    path.write_text('{"step": 0, "val_loss": 7.0}\n{"step": 9, "val_loss": 300.0}\n')
    cells = make_cells(load_runs(tmp_path))
    assert curve_limits(cells) == pytest.approx((7, 300), abs=15)
    assert final_limits(cells) == pytest.approx((300, 300), abs=1)
    figure = plots.draw_losses(cells)
    assert figure is not None
    assert not list(figure.axes[0].texts)


def test_two_seeds_do_not_squeeze_the_others(tmp_path: Path) -> None:
    for seed, losses in enumerate(((3.0, 3.3), (3.1, 4.0))):
        for norm, loss in zip(("layer", "rms"), losses, strict=True):
            summary(tmp_path, norm, seed, loss)
    cells = make_cells(load_runs(tmp_path))
    assert interval([3.3, 4.0])[1] == pytest.approx(4.45, abs=0.01)
    assert final_limits(cells) == pytest.approx((2.35, 4.35), abs=0.05)  # means 0.6 apart
    assert final_limits(cells, stretch=0.1) == pytest.approx((2.97, 3.73), abs=0.05)


def test_what_a_norm_sees_is_said_in_legends_tables_and_words(tmp_path: Path) -> None:
    summary(tmp_path, "layer", 1, 3.0)
    summary(tmp_path, "batch", 1, 2.9, sees_in_training=[FUTURE])
    summary(tmp_path / "a", "rms", 1, 3.1, placement="none")
    summary(tmp_path, "rms", 1, 3.1, sees_in_training=[FUTURE])  # from a slot that has its own norm
    summary(tmp_path, "odd", 1, 2.8, sees_in_training=[UNKNOWN], sees_in_evaluation=[UNKNOWN])
    cells = make_cells(load_runs(tmp_path))
    figure = plots.draw_losses([c for c in cells if not c.void])
    assert figure is not None
    labels = [c.get_label() for c in figure.axes[0].containers]
    assert labels == ["batch (leaky in training)", "layer", "rms (leaky in part)"]
    (odd,) = (cell for cell in cells if cell.void)
    assert odd.marked(odd.norm) == "odd (unknown in evaluation)"
    words = "\n".join(tables.plain_words(cells, Baseline()))
    assert "Not a result, because evaluation may see what it must not: odd-pre-bs4." in words
    rows = {row["cell"]: row for row in tables.comparison(cells, Baseline())}
    assert rows["batch-pre-bs4"]["sees in training"] == FUTURE
    assert rows["batch-pre-bs4"]["sees in evaluation"] == "its past"


def test_a_rate_that_alone_was_survived_is_seen(tmp_path: Path) -> None:
    for lr in (0.1, 1.0):
        lost = {"diverged_at": 3} if lr == 1.0 else {}
        summary(tmp_path / str(lr), "dummy", 1, 3.0, {"optim.lr": lr}, **lost)
    figure = plots.draw_lr(make_cells(load_runs(tmp_path)))
    assert figure is not None
    (line, *_), *_ = figure.axes[0].containers
    assert len(line.get_xdata()) == 1
    assert line.get_marker() == "o"


def test_pictures_of_runs_that_differ_in_much_have_room_for_their_names(tmp_path: Path) -> None:
    """Otherwise matplotlib warns, and the maps and curves have no height."""
    for seed in (1, 2):
        much = {f"model.some_key_of_theirs_{i}": seed for i in range(25)}
        summary(tmp_path, "layer", seed, 3.0 + seed, much)
    cells = make_cells(load_runs(tmp_path))
    for figure in (plots.draw_depth(cells), plots.draw_curves(cells)):
        assert figure is not None
        figure.draw_without_rendering()
        assert all(axis.get_window_extent().height > 100 for axis in figure.axes[:2])


def test_names_with_brackets_and_dollars_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, path in enumerate(["/[/x]/$a$", "/[old]/:on:", "/[old]/:on:"]):
        summary(tmp_path / str(i), "layer", i, 3.0, {"data.path": path})
    runs = load_runs(tmp_path)
    print_table(runs)
    shown = "".join(capsys.readouterr().out.split())
    assert "data.path=/[old]/:on:." in shown
    assert "/[/x]/$a$" in shown.replace("││││││", "")
    assert plots.save(plots.draw(make_cells(runs)), tmp_path)


def test_where_all_leak_there_is_no_picture_but_a_page(tmp_path: Path) -> None:
    summary(tmp_path, "instance", 0, 0.5, sees_in_evaluation=["later tokens"])
    result = run_program(str(tmp_path), script="report")
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.glob("*.png"))
