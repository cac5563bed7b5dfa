"""The report: intervals and paired differences are right, leaks and chance are named."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest

from gpt import findings, pictures, report
from gpt.cells import (
    Baseline,
    choose_baseline,
    curve_limits,
    final_limits,
    interval,
    make_cells,
    tuned,
)
from gpt.errors import UserError
from gpt.results import load_summaries, print_table
from gpt.sight import FUTURE, UNKNOWN
from tests.conftest import TINY
from tests.made_runs import summary
from tests.programs import run_program


def test_the_words_say_what_is_chance_what_is_leaky_and_what_diverged(folder: Path) -> None:
    words = "\n".join(findings.plain_words(make_cells(load_summaries(folder)), Baseline()))
    assert "The lowest validation loss is rms-pre-bs4's: 3.0967" in words
    assert (
        "rms-pre-bs4 against layer-pre-bs4: -0.1033 ± 0.0143 nats a token over 3 "
        "seeds: better beyond" in words
    )
    assert "dummy-pre-bs4 against layer-pre-bs4" in words
    assert "no difference that these seeds can tell" in words
    assert "instance-pre-bs4" in words.split("No result")[1]
    assert "scale-pre-bs4: 1 of 1 runs diverged" in words


def test_other_tokenizers_compare_in_bits_a_byte_alone(tmp_path: Path) -> None:
    """Bytes have the smaller loss a token and are the worse: a token of a BPE is several bytes."""
    for seed in range(3):
        for name, nats, bits in (("layer", 3.0, 1.5), ("rms", 1.4 + 0.01 * seed, 2.0)):
            tokenizer = "bpe" if name == "layer" else "bytes"
            summary(tmp_path, name, seed, nats, val_bpb=bits, tokenizer=tokenizer)
    cells = make_cells(load_summaries(tmp_path))
    words = "\n".join(findings.plain_words(cells, Baseline()))
    assert "losses are compared in bits a byte" in words
    assert "rms-pre-bs4 against layer-pre-bs4: +0.5000 ± 0.0000 bits a byte" in words
    assert "worse beyond chance" in words
    axis = report.figure_losses(cells).layout.xaxis.title.text  # type: ignore[union-attr]
    assert axis == "bits a byte"
    assert [row["val loss"][:3] for row in findings.table(cells, Baseline())] == ["3.0", "1.4"]


def test_a_summary_that_is_none_is_one_line(tmp_path: Path) -> None:
    summary(tmp_path, "layer", 0, 3.0)
    (tmp_path / "layer-pre-bs4-s0" / "summary.json").write_text("{}")
    result = run_program(str(tmp_path), script="report")
    assert result.returncode == 65
    assert result.stderr.count("\n") == 1
    assert "summary.json: not a run's summary" in result.stderr


def test_a_single_seed_may_be_chance(tmp_path: Path) -> None:
    summary(tmp_path, "layer", 1, 3.0)
    summary(tmp_path, "rms", 1, 2.0)
    words = findings.plain_words(make_cells(load_summaries(tmp_path)), Baseline())
    assert any("of one seed: it may be chance" in line for line in words)


def test_the_table_ranks_results_and_lists_the_others_last(folder: Path) -> None:
    summaries = load_summaries(folder)
    paths = report.write(make_cells(summaries), folder, "a sweep")
    assert [p.name for p in paths] == [
        "report.html",
        "table.csv",
        "table.md",
        "activations.csv",
        "activations.md",
    ]
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    names = [row["cell"].split("-")[0] for row in rows]
    assert names == ["rms", "layer", "dummy", "scale", "instance"]
    assert rows[0]["minus best norm=layer"] == "-0.1033 ± 0.0143"
    assert rows[0]["pairs"] == "3"
    assert rows[1]["minus best norm=layer"] == ""  # itself
    assert rows[3]["val loss"] == "(diverged at step 7)"
    assert rows[4]["sees in evaluation"] == "later tokens"
    assert (folder / "table.md").read_text().count("\n") == 7


def test_a_rate_at_which_runs_diverged_is_marked_as_such(tmp_path: Path) -> None:
    """Else a mean of the survivors would look as good as any, and a rate without any be absent."""
    for lr, diverged in ((0.1, ()), (0.3, (2,)), (1.0, (1, 2))):
        for seed in (1, 2):
            folder = tmp_path / str(lr)
            lost = {"diverged_at": 5} if seed in diverged else {}
            summary(folder, "layer", seed, 3.0 + seed / 10, {"optim.lr": lr}, **lost)
    cells = make_cells(load_summaries(tmp_path))
    figure = report.figure_lr(cells)
    assert figure is not None
    line, crosses = figure.data
    assert (line.x, crosses.x) == ((0.1, 0.3), (0.3, 1.0))
    assert crosses.text == ("1 of 2 diverged", "2 of 2 diverged")
    drawn = pictures.draw_lr(cells)
    assert drawn is not None
    marks = [mark for mark in drawn.axes[0].lines if mark.get_marker() == "x"]
    assert [list(mark.get_xdata()) for mark in marks] == [[0.3, 1.0]]
    assert pictures.draw_lr([cell for cell in cells if not cell.losses]) is None


def test_a_leaky_norm_is_not_shown_by_its_learning_rates(tmp_path: Path) -> None:
    for lr in (0.1, 0.3):
        for norm, seen in (("layer", []), ("batch", ["later tokens"])):
            summary(tmp_path / str(lr), norm, 1, 3.0, {"optim.lr": lr}, sees_in_evaluation=seen)
    figure = report.figure_lr(make_cells(load_summaries(tmp_path)))
    assert figure is not None
    assert {line.name for line in figure.data} == {"layer-pre-bs4"}


def test_what_runs_differ_in_is_told_apart_from_what_they_share(tmp_path: Path) -> None:
    for norm in ("layer", "rms"):
        summary(tmp_path, norm, 1, 3.0)
    rows, shared = report.differing(load_summaries(tmp_path))
    assert rows == [{"run": f"{norm}-pre-bs4-s1", "norm.name": norm} for norm in ("layer", "rms")]
    assert {row["key"]: row["value"] for row in shared} == {
        "placement.name": "pre", "seed": "1", "train.batch_size": "4",
    }  # fmt: skip


def test_a_curve_that_diverges_ends_in_a_cross_on_the_page_and_in_the_picture(
    tmp_path: Path,
) -> None:
    summary(tmp_path, "layer", 1, 3.0)
    summary(tmp_path, "rms", 1, None, diverged_at=12)
    cells = make_cells(load_summaries(tmp_path))
    drawn = {line.get_label(): line for line in pictures.draw_curves(cells).axes[0].lines}
    page = {line.name: line for line in report.figure_curves(cells).data}
    assert page["layer-pre-bs4"].mode == "lines"
    assert page["rms-pre-bs4"].mode == "lines+markers"
    assert page["rms-pre-bs4"].marker.size == (0, 0, 9)
    assert page["rms-pre-bs4"].marker.symbol == "x"
    assert page["rms-pre-bs4"].y == tuple(drawn["rms"].get_ydata())


@pytest.mark.parametrize(
    ("sha256", "unit", "last"), [("0", "nats a token", 3.0), ("1", "bits a byte", 1.5)]
)
def test_curves_are_in_the_unit_of_the_tables(
    sha256: str, unit: str, last: float, tmp_path: Path
) -> None:
    summary(tmp_path, "layer", 1, 3.0)
    summary(tmp_path, "rms", 1, 4.0, corpus_sha256=sha256 * 64)
    cells = make_cells(load_summaries(tmp_path))
    page = report.figure_curves(cells)
    assert page.layout.yaxis.title.text == unit
    lines = {line.name.split("-")[0]: line.y[-1] for line in page.data}
    assert lines["layer"] == pytest.approx(last, abs=0.1)
    assert unit in pictures.draw_curves(cells).get_supylabel()


def test_runs_that_are_not_finished_are_counted(folder: Path) -> None:
    run = folder / "rms-pre-bs4-s9"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    for path in folder.glob("*/summary.json"):
        (path.parent / "DONE").touch()
    result = run_program(str(folder), script="report")
    assert result.returncode == 0, result.stderr
    assert "Runs that are not finished, and not in here: 1" in result.stdout
    assert "not finished, and not in here: 1." in (folder / "report.html").read_text()


def test_the_pictures_are_of_the_best_learning_rates_and_of_no_leak(folder: Path) -> None:
    cells = make_cells(load_summaries(folder))
    paths = pictures.draw(cells, folder)
    assert [p.name for p in paths] == ["losses.png", "curves.png", "depth.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    figure = pictures.draw_losses(tuned([c for c in cells if not c.void]))
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
    cells = make_cells(load_summaries(tmp_path))
    assert curve_limits(cells) == pytest.approx((2.6, 12.4), abs=0.1)
    assert final_limits(cells) == pytest.approx((2.5, 12.5), abs=0.1)
    assert report.figure_losses(cells).layout.xaxis.range == final_limits(cells)  # type: ignore[union-attr]
    figure = pictures.draw_losses(cells)
    assert figure is not None
    (text,) = figure.axes[0].texts
    assert text.get_text() == "3.518e+04 → "
    page = report.figure_losses(cells)
    assert page is not None
    beyond, *within = page.data
    assert (beyond.name, beyond.text) == ("dummy", ("3.518e+04 →",))
    assert {line.mode for line in page.data} == {"markers+text"}  # no line from row to row
    assert beyond.x[0] == page.layout.xaxis.range[1]
    assert [line.text for line in within] == [("",), ("",)]


def test_where_all_losses_are_out_of_bounds_they_are_shown(tmp_path: Path) -> None:
    summary(tmp_path, "layer", 1, 300.0)
    path = tmp_path / "layer-pre-bs4-s1" / "metrics.jsonl"
    path.write_text('{"step": 0, "val_loss": 7.0}\n{"step": 9, "val_loss": 300.0}\n')
    cells = make_cells(load_summaries(tmp_path))
    assert curve_limits(cells) == pytest.approx((7, 300), abs=15)
    assert final_limits(cells) == pytest.approx((300, 300), abs=1)
    figure = pictures.draw_losses(cells)
    assert figure is not None
    assert not list(figure.axes[0].texts)


def test_two_seeds_do_not_squeeze_the_others(tmp_path: Path) -> None:
    for seed, losses in enumerate(((3.0, 3.3), (3.1, 4.0))):
        for norm, loss in zip(("layer", "rms"), losses, strict=True):
            summary(tmp_path, norm, seed, loss)
    cells = make_cells(load_summaries(tmp_path))
    assert interval([3.3, 4.0])[1] == pytest.approx(4.45, abs=0.01)
    assert final_limits(cells) == pytest.approx((2.35, 4.35), abs=0.05)  # means 0.6 apart
    assert final_limits(cells, stretch=0.1) == pytest.approx((2.97, 3.73), abs=0.05)


def test_what_a_norm_sees_is_said_in_legends_tables_and_words(tmp_path: Path) -> None:
    summary(tmp_path, "layer", 1, 3.0)
    summary(tmp_path, "batch", 1, 2.9, sees_in_training=[FUTURE])
    summary(tmp_path / "a", "rms", 1, 3.1, placement="none")
    summary(tmp_path, "rms", 1, 3.1, sees_in_training=[FUTURE])  # of a slot's own norm
    summary(tmp_path, "odd", 1, 2.8, sees_in_training=[UNKNOWN], sees_in_evaluation=[UNKNOWN])
    cells = make_cells(load_summaries(tmp_path))
    figure = pictures.draw_losses([c for c in cells if not c.void])
    assert figure is not None
    labels = [c.get_label() for c in figure.axes[0].containers]
    assert labels == ["batch (leaky in training)", "layer", "rms (leaky in part)"]
    curves = [trace.name for trace in report.figure_curves(cells).data]
    assert "odd-pre-bs4 (unknown in evaluation)" in curves
    words = "\n".join(findings.plain_words(cells, Baseline()))
    assert "No result, for evaluation may see what it must not: odd-pre-bs4." in words
    rows = {row["cell"]: row for row in findings.table(cells, Baseline())}
    assert rows["batch-pre-bs4"]["sees in training"] == FUTURE
    assert rows["batch-pre-bs4"]["sees in evaluation"] == "its past"


def test_a_rate_that_alone_was_survived_is_seen(tmp_path: Path) -> None:
    for lr in (0.1, 1.0):
        lost = {"diverged_at": 3} if lr == 1.0 else {}
        summary(tmp_path / str(lr), "dummy", 1, 3.0, {"optim.lr": lr}, **lost)
    figure = pictures.draw_lr(make_cells(load_summaries(tmp_path)))
    assert figure is not None
    (line, *_), *_ = figure.axes[0].containers
    assert len(line.get_xdata()) == 1
    assert line.get_marker() == "o"


def test_activations_are_of_the_last_step_and_of_all_seeds(tmp_path: Path) -> None:
    for seed, rms in ((1, 2.0), (2, 4.0)):
        summary(tmp_path, "layer", seed, 3.0)
        rows = [
            {
                "step": s,
                "residual": {d: {"after": {"rms": x}} for d, x in (("embd", 1.0), ("h.0", y))},
            }
            for s, y in ((1, 9.0), (5, rms))
        ]
        path = tmp_path / f"layer-pre-bs4-s{seed}" / "stats.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = findings.activations(make_cells(load_summaries(tmp_path)))
    assert row["stream rms at the embedding"] == "1"
    assert row["after the last block"] == "3"
    assert row["largest attention logit"] == ""


def test_activations_of_diverged_runs_are_left_out(tmp_path: Path) -> None:
    summary(tmp_path, "layer", 1, 3.0)
    summary(tmp_path, "layer", 2, None, diverged_at=5)
    lost = {"step": 1, "residual": {"embd": {"after": {"rms": 1e9}}}}
    (tmp_path / "layer-pre-bs4-s2" / "stats.jsonl").write_text(json.dumps(lost) + "\n")
    (row,) = findings.activations(make_cells(load_summaries(tmp_path)))
    assert row["stream rms at the embedding"] == "1"


def test_an_overflow_at_the_last_depth_is_not_passed_over(tmp_path: Path) -> None:
    """`stats.jsonl` has null where a number was not finite."""
    summary(tmp_path, "layer", 1, 3.0)
    depths = {"embd": 1.0, "h.0": 2.0, "h.1": None}
    row = {"step": 5, "residual": {d: {"after": {"rms": rms}} for d, rms in depths.items()}}
    (tmp_path / "layer-pre-bs4-s1" / "stats.jsonl").write_text(json.dumps(row) + "\n")
    cells = make_cells(load_summaries(tmp_path))
    (ends,) = findings.activations(cells)
    assert ends["stream rms at the embedding"] == "1"
    assert ends["after the last block"] == "nan"
    drawn = report.depth_maps(cells)["residual: after/rms"]["layer-pre-bs4"]
    assert drawn["z"] == [[1.0], [2.0], [None]]


def test_what_survivors_show_is_said_to_be_theirs(folder: Path) -> None:
    summary(folder, "l2", 0, 1.0)
    summary(folder, "l2", 1, 1.1)
    summary(folder, "l2", 2, None, diverged_at=3)
    cells = make_cells(load_summaries(folder))
    (line,) = (x for x in findings.plain_words(cells, Baseline()) if x.startswith("l2-pre-bs4 aga"))
    assert "better beyond chance. Of the runs of l2-pre-bs4 1 of 3 diverged: this is of" in line
    names = [row["cell"].split("-")[0] for row in findings.table(cells, Baseline())]
    assert names == ["rms", "layer", "dummy", "l2", "scale", "instance"]


def test_what_else_two_norms_differ_in_is_said(tmp_path: Path) -> None:
    for norm, eps in (("layer", 1e-5), ("rms", 1e-3)):
        summary(tmp_path, norm, 1, 3.0, {"norm.eps": eps})
    words = findings.plain_words(make_cells(load_summaries(tmp_path)), Baseline())
    assert any("They differ in norm.eps too." in line for line in words)


def test_the_lowest_loss_is_one_of_each_text(tmp_path: Path) -> None:
    summary(tmp_path, "layer", 1, 1.0, corpus="easy", corpus_sha256="1" * 64)
    summary(tmp_path, "rms", 1, 2.0, corpus="hard", corpus_sha256="2" * 64)
    words = findings.plain_words(make_cells(load_summaries(tmp_path)), Baseline())
    assert words[1].startswith("The lowest validation loss on easy (11111111) is layer-pre-bs4")
    assert words[2].startswith("The lowest validation loss on hard (22222222) is rms-pre-bs4")


def test_a_run_counts_once_however_it_is_found(folder: Path) -> None:
    twice = load_summaries(folder, folder / "layer-pre-bs4-s0")
    assert len(twice) == len(load_summaries(folder))


def test_a_cell_that_partly_diverged_is_not_the_best(folder: Path) -> None:
    summary(folder, "l2", 0, 1.0)
    summary(folder, "l2", 1, None, diverged_at=3)
    cells = make_cells(load_summaries(folder))
    assert findings.plain_words(cells, Baseline())[0].startswith(
        "The lowest validation loss is rms"
    )
    assert (
        next(r for r in findings.table(cells, Baseline()) if r["cell"] == "l2-pre-bs4")["seeds"]
        == "1 of 2"
    )


def test_any_key_can_be_the_baseline(tmp_path: Path) -> None:
    for seed in (1, 2):
        for warmup, loss in ((0, 3.0), (40, 2.5)):
            config = {"optim.warmup_steps": warmup}
            summary(tmp_path / str(warmup), "layer", seed, loss + seed, config)
    result = run_program(str(tmp_path), "baseline=optim.warmup_steps=40", script="report")
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "report.html").read_text()
    assert "warmup_steps=0 against layer-pre-bs4 optim.warmup_steps=40: +0.5000" in page
    wrong = run_program(str(tmp_path), "baseline=optim.warmup=40", script="report")
    assert wrong.returncode == 64
    assert "did you mean 'optim.warmup_steps'" in wrong.stderr


def test_what_most_runs_have_goes_without_saying(tmp_path: Path) -> None:
    for norm, steps in (("layer", 10), ("rms", 10), ("rms", 20)):
        summary(tmp_path / str(steps), norm, 1, 3.0 + steps / 100, {"train.steps": steps})
    result = run_program(str(tmp_path), "baseline=train.steps=10", script="report")
    assert result.returncode == 0, result.stderr
    sentence = "Where a name does not say otherwise: train.steps=10."
    assert sentence in result.stdout
    page = (tmp_path / "report.html").read_text()
    assert f"<li>{sentence}</li>" in page
    assert "rms-pre-bs4 train.steps=20 against rms-pre-bs4: +0.1000" in page
    assert "Without a train.steps=10" not in page  # the one at 10 is the baseline, though unsaid
    wrong = run_program(str(tmp_path), "baseline=train.steps=30", script="report")
    assert wrong.returncode == 64
    assert "with one of 10, 20" in wrong.stderr
    assert wrong.stderr.count("\n") == 1
    same = run_program(str(tmp_path), "baseline=train.batch=4", script="report")
    assert "did you mean 'train.batch_size'" in same.stderr
    assert (tmp_path / "table.md").read_text().endswith(f"|\n\n{sentence}\n")


def test_a_baseline_that_nothing_compares_with_is_refused(tmp_path: Path) -> None:
    """layer's own eps tells it from no other run."""
    for i, (norm, eps) in enumerate((("rms", 1e-5), ("rms", 1e-5), ("rms", 1e-3), ("layer", 0.01))):
        summary(tmp_path / str(i), norm, i, 3.0, {"norm.eps": eps, "compile": i > 1})
    cells = make_cells(load_summaries(tmp_path))
    message = "nothing differs from it in that alone; expected KEY=VALUE with one of compile, norm"
    with pytest.raises(UserError, match=message):
        choose_baseline("baseline=norm.eps=0.01", cells)
    for i, compiled in enumerate((False, True)):
        summary(tmp_path / "b" / str(i), "rms", 1, 3.0, {"compile": compiled})
    cells = make_cells(load_summaries(tmp_path / "b"))
    assert choose_baseline("baseline=compile=true", cells) == Baseline("compile", "true")
    with pytest.raises(UserError, match="with one of False, True"):
        choose_baseline("baseline=compile=yes", cells)


def test_pictures_of_runs_that_differ_in_much_have_room_for_their_names(tmp_path: Path) -> None:
    """Else matplotlib warns, and the maps and curves have no height."""
    for seed in (1, 2):
        much = {f"model.some_key_of_theirs_{i}": seed for i in range(25)}
        summary(tmp_path, "layer", seed, 3.0 + seed, much)
    cells = make_cells(load_summaries(tmp_path))
    for figure in (pictures.draw_depth(cells), pictures.draw_curves(cells)):
        assert figure is not None
        figure.draw_without_rendering()
        assert all(axis.get_window_extent().height > 100 for axis in figure.axes[:2])


def test_names_with_brackets_and_dollars_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, path in enumerate(["/[/x]/$a$", "/[old]/:on:", "/[old]/:on:"]):
        summary(tmp_path / str(i), "layer", i, 3.0, {"data.path": path})
    summaries = load_summaries(tmp_path)
    print_table(summaries)
    shown = "".join(capsys.readouterr().out.split())
    assert "data.path=/[old]/:on:." in shown
    assert "/[/x]/$a$" in shown.replace("││││││", "")
    assert pictures.draw(make_cells(summaries), tmp_path)


def test_where_all_leak_there_is_no_picture_but_a_page(tmp_path: Path) -> None:
    summary(tmp_path, "instance", 0, 0.5, sees_in_evaluation=["later tokens"])
    result = run_program(str(tmp_path), script="report")
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.glob("*.png"))


def test_a_damaged_configuration_is_one_line(folder: Path) -> None:
    (folder / "rms-pre-bs4-s0" / "config.yaml").write_text("seed: [")
    result = run_program(str(folder), script="report")
    assert result.returncode == 65
    assert result.stderr.count("\n") == 1
    assert "config.yaml: damaged" in result.stderr
    assert run_program(str(folder), "nowhere", script="report").returncode == 66


def test_the_page_needs_nothing_but_itself(folder: Path) -> None:
    report.write(make_cells(load_summaries(folder)), folder, "a <sweep>")
    page = (folder / "report.html").read_text()
    assert "<title>a &lt;sweep&gt;</title>" in page
    assert "<script src" not in page
    assert "<link" not in page
    assert page.count("plotly-graph-div") == 2
    assert '"residual: after/rms":{"dummy-pre-bs4":{"x":[1],"y":["embd"],"z":[[1.0]]}' in page


def test_a_browser_draws_it(folder: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser on this machine")
    report.write(make_cells(load_summaries(folder)), folder, "a sweep")
    result = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
         "--dump-dom", (folder / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.stdout.count('class="main-svg"') >= 3  # plotly has drawn
    assert result.stdout.count('<g class="hm">') == 2  # a map for each of two cells


def test_two_runs_are_compared_with_one_command(corpus: Path, tmp_path: Path) -> None:
    for norm in ("layer", "rms"):
        fixed = {**TINY, "data": "text", "data.path": str(corpus), "norm": norm}
        args = [f"{k}={v}" for k, v in fixed.items()]
        assert run_program(*args, f"run_dir={norm}", cwd=tmp_path).returncode == 0
    result = run_program("layer", "rms", script="report", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "layer" / "report.html").read_text()
    assert "<td>rms-pre-bs4</td>" in page
    assert "norm.name" in page
    assert "of one seed: it may be chance" in page
    assert "residual: angle" in page
