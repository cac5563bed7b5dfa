"""The report: intervals and paired differences are right, leaks and chance are named."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from gpt.common.errors import UserError
from gpt.reports import page, plots, tables
from gpt.reports.cells import (
    Baseline,
    choose_baseline,
    make_cells,
)
from gpt.reports.runs import load_runs
from tests.tools.configs import TINY
from tests.tools.made_runs import summary
from tests.tools.programs import run_program


def test_the_words_say_what_is_chance_what_is_leaky_and_what_diverged(folder: Path) -> None:
    words = "\n".join(tables.plain_words(make_cells(load_runs(folder)), Baseline()))
    assert "The lowest validation loss is rms-pre-bs4's: 3.0967" in words
    assert (
        "rms-pre-bs4 against layer-pre-bs4: -0.1033 ± 0.0143 nats a token over 3 "
        "seeds: better beyond" in words
    )
    assert "dummy-pre-bs4 against layer-pre-bs4" in words
    assert "no difference that these seeds can show" in words
    assert "instance-pre-bs4" in words.split("Not a result")[1]
    assert "scale-pre-bs4: 1 of 1 runs diverged" in words


def test_other_tokenizers_compare_in_bits_a_byte_alone(tmp_path: Path) -> None:
    """Bytes have the smaller loss a token but are worse: a BPE token is several bytes."""
    for seed in range(3):
        for name, nats, bits in (("layer", 3.0, 1.5), ("rms", 1.4 + 0.01 * seed, 2.0)):
            tokenizer = "bpe" if name == "layer" else "bytes"
            summary(tmp_path, name, seed, nats, val_bpb=bits, tokenizer=tokenizer)
    cells = make_cells(load_runs(tmp_path))
    words = "\n".join(tables.plain_words(cells, Baseline()))
    assert "losses are compared in bits a byte" in words
    assert "rms-pre-bs4 against layer-pre-bs4: +0.5000 ± 0.0000 bits a byte" in words
    assert "worse beyond chance" in words
    figure = plots.draw_losses(cells)
    assert figure is not None
    assert figure.axes[0].get_xlabel() == "validation loss, bits a byte"
    assert [row["val loss"][:3] for row in tables.comparison(cells, Baseline())] == ["3.0", "1.4"]


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
    words = tables.plain_words(make_cells(load_runs(tmp_path)), Baseline())
    assert any("from one seed: it may be chance" in line for line in words)


def test_the_table_ranks_results_and_lists_the_others_last(folder: Path) -> None:
    paths = page.write(make_cells(load_runs(folder)), folder, "a sweep")
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
    assert rows[1]["minus best norm=layer"] == ""  # it is the baseline
    assert rows[3]["val loss"] == "(diverged at step 7)"
    assert rows[4]["sees in evaluation"] == "later tokens"
    assert (folder / "table.md").read_text().count("\n") == 7


def test_what_runs_differ_in_is_told_apart_from_what_they_share(tmp_path: Path) -> None:
    for norm in ("layer", "rms"):
        summary(tmp_path, norm, 1, 3.0)
    rows, shared = page.differing(load_runs(tmp_path))
    assert rows == [{"run": f"{norm}-pre-bs4-s1", "norm.name": norm} for norm in ("layer", "rms")]
    assert {row["key"]: row["value"] for row in shared} == {
        "placement.name": "pre", "seed": "1", "train.batch_size": "4",
    }  # fmt: skip


def test_runs_that_are_not_finished_are_counted(folder: Path) -> None:
    run = folder / "rms-pre-bs4-s9"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    for path in folder.glob("*/summary.json"):
        (path.parent / "DONE").touch()
    result = run_program(str(folder), script="report")
    assert result.returncode == 0, result.stderr
    assert "Unfinished runs left out: 1" in result.stdout
    assert "Unfinished runs left out: 1." in (folder / "report.html").read_text()


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
    (row,) = tables.activations(make_cells(load_runs(tmp_path)))
    assert row["stream rms at the embedding"] == "1"
    assert row["after the last block"] == "3"
    assert row["largest attention logit"] == ""


def test_activations_of_diverged_runs_are_left_out(tmp_path: Path) -> None:
    summary(tmp_path, "layer", 1, 3.0)
    summary(tmp_path, "layer", 2, None, diverged_at=5)
    lost = {"step": 1, "residual": {"embd": {"after": {"rms": 1e9}}}}
    (tmp_path / "layer-pre-bs4-s2" / "stats.jsonl").write_text(json.dumps(lost) + "\n")
    (row,) = tables.activations(make_cells(load_runs(tmp_path)))
    assert row["stream rms at the embedding"] == "1"


def test_an_overflow_at_the_last_depth_is_not_passed_over(tmp_path: Path) -> None:
    """`stats.jsonl` has null for a number that was not finite."""
    summary(tmp_path, "layer", 1, 3.0)
    depths = {"embd": 1.0, "h.0": 2.0, "h.1": None}
    row = {"step": 5, "residual": {d: {"after": {"rms": rms}} for d, rms in depths.items()}}
    (tmp_path / "layer-pre-bs4-s1" / "stats.jsonl").write_text(json.dumps(row) + "\n")
    cells = make_cells(load_runs(tmp_path))
    (ends,) = tables.activations(cells)
    assert ends["stream rms at the embedding"] == "1"
    assert ends["after the last block"] == "nan"
    drawn = page.depth_maps(cells)["residual: after/rms"]["layer-pre-bs4"]
    assert drawn["z"] == [[1.0], [2.0], [None]]


def test_what_survivors_show_is_said_to_be_theirs(folder: Path) -> None:
    summary(folder, "l2", 0, 1.0)
    summary(folder, "l2", 1, 1.1)
    summary(folder, "l2", 2, None, diverged_at=3)
    cells = make_cells(load_runs(folder))
    (line,) = (x for x in tables.plain_words(cells, Baseline()) if x.startswith("l2-pre-bs4 aga"))
    assert "better beyond chance. l2-pre-bs4: 1 of 3 diverged, so only the other" in line
    names = [row["cell"].split("-")[0] for row in tables.comparison(cells, Baseline())]
    assert names == ["rms", "layer", "dummy", "l2", "scale", "instance"]


def test_what_else_two_norms_differ_in_is_said(tmp_path: Path) -> None:
    for norm, eps in (("layer", 1e-5), ("rms", 1e-3)):
        summary(tmp_path, norm, 1, 3.0, {"norm.eps": eps})
    words = tables.plain_words(make_cells(load_runs(tmp_path)), Baseline())
    assert any("They differ in norm.eps too." in line for line in words)


def test_the_lowest_loss_is_one_of_each_text(tmp_path: Path) -> None:
    summary(tmp_path, "layer", 1, 1.0, corpus="easy", corpus_sha256="1" * 64)
    summary(tmp_path, "rms", 1, 2.0, corpus="hard", corpus_sha256="2" * 64)
    words = tables.plain_words(make_cells(load_runs(tmp_path)), Baseline())
    assert words[1].startswith("The lowest validation loss on easy (11111111) is layer-pre-bs4")
    assert words[2].startswith("The lowest validation loss on hard (22222222) is rms-pre-bs4")


def test_a_run_counts_once_however_it_is_found(folder: Path) -> None:
    twice = load_runs(folder, folder / "layer-pre-bs4-s0")
    assert len(twice) == len(load_runs(folder))


def test_a_cell_that_partly_diverged_is_not_the_best(folder: Path) -> None:
    summary(folder, "l2", 0, 1.0)
    summary(folder, "l2", 1, None, diverged_at=3)
    cells = make_cells(load_runs(folder))
    assert tables.plain_words(cells, Baseline())[0].startswith("The lowest validation loss is rms")
    assert (
        next(r for r in tables.comparison(cells, Baseline()) if r["cell"] == "l2-pre-bs4")["seeds"]
        == "1 of 2"
    )


def test_any_key_can_be_the_baseline(tmp_path: Path) -> None:
    for seed in (1, 2):
        for warmup, loss in ((0, 3.0), (40, 2.5)):
            config = {"optim.warmup_steps": warmup}
            summary(tmp_path / str(warmup), "layer", seed, loss + seed, config)
    result = run_program(str(tmp_path), "baseline=optim.warmup_steps=40", script="report")
    assert result.returncode == 0, result.stderr
    html = (tmp_path / "report.html").read_text()
    assert "warmup_steps=0 against layer-pre-bs4 optim.warmup_steps=40: +0.5000" in html
    wrong = run_program(str(tmp_path), "baseline=optim.warmup=40", script="report")
    assert wrong.returncode == 64
    assert "did you mean 'optim.warmup_steps'" in wrong.stderr


def test_what_most_runs_have_goes_without_saying(tmp_path: Path) -> None:
    for norm, steps in (("layer", 10), ("rms", 10), ("rms", 20)):
        summary(tmp_path / str(steps), norm, 1, 3.0 + steps / 100, {"train.steps": steps})
    result = run_program(str(tmp_path), "baseline=train.steps=10", script="report")
    assert result.returncode == 0, result.stderr
    sentence = "Unless a name says otherwise: train.steps=10."
    assert sentence in result.stdout
    html = (tmp_path / "report.html").read_text()
    assert f"<li>{sentence}</li>" in html
    assert "rms-pre-bs4 train.steps=20 against rms-pre-bs4: +0.1000" in html
    assert "Without a train.steps=10" not in html  # labels omit it, but it is the baseline
    wrong = run_program(str(tmp_path), "baseline=train.steps=30", script="report")
    assert wrong.returncode == 64
    assert "with one of 10, 20" in wrong.stderr
    assert wrong.stderr.count("\n") == 1
    same = run_program(str(tmp_path), "baseline=train.batch=4", script="report")
    assert "did you mean 'train.batch_size'" in same.stderr
    assert (tmp_path / "table.md").read_text().endswith(f"|\n\n{sentence}\n")


def test_a_baseline_that_nothing_compares_with_is_refused(tmp_path: Path) -> None:
    """Only one run has layer, so its eps distinguishes it from no other layer run."""
    for i, (norm, eps) in enumerate((("rms", 1e-5), ("rms", 1e-5), ("rms", 1e-3), ("layer", 0.01))):
        summary(tmp_path / str(i), norm, i, 3.0, {"norm.eps": eps, "compile": i > 1})
    cells = make_cells(load_runs(tmp_path))
    message = "nothing differs from it in that alone; expected KEY=VALUE with one of compile, norm"
    with pytest.raises(UserError, match=message):
        choose_baseline("baseline=norm.eps=0.01", cells)
    for i, compiled in enumerate((False, True)):
        summary(tmp_path / "b" / str(i), "rms", 1, 3.0, {"compile": compiled})
    cells = make_cells(load_runs(tmp_path / "b"))
    assert choose_baseline("baseline=compile=true", cells) == Baseline("compile", "true")
    with pytest.raises(UserError, match="with one of False, True"):
        choose_baseline("baseline=compile=yes", cells)


def test_a_damaged_configuration_is_one_line(folder: Path) -> None:
    (folder / "rms-pre-bs4-s0" / "config.yaml").write_text("seed: [")
    result = run_program(str(folder), script="report")
    assert result.returncode == 65
    assert result.stderr.count("\n") == 1
    assert "config.yaml: damaged" in result.stderr
    assert run_program(str(folder), "nowhere", script="report").returncode == 66


def test_the_page_needs_nothing_but_itself(folder: Path) -> None:
    cells = make_cells(load_runs(folder))
    svgs = list(map(plots.to_svg, plots.draw(cells).values()))
    page.write(cells, folder, "a <sweep>", svgs=svgs)
    html = (folder / "report.html").read_text()
    assert "<title>a &lt;sweep&gt;</title>" in html
    assert "<script src" not in html
    assert "<link" not in html
    assert html.count("</svg>") >= 3
    assert html.count('xlink:href="http') == 0
    assert '"residual: after/rms":{"dummy-pre-bs4":{"x":[1],"y":["embd"],"z":[[1.0]]}' in html


def test_a_browser_draws_it(folder: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser on this machine")
    page.write(make_cells(load_runs(folder)), folder, "a sweep")
    result = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
         "--dump-dom", (folder / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.stdout.count('class="main-svg"') >= 2  # plotly has drawn
    assert result.stdout.count('<g class="hm">') == 2  # a map for each of two cells


def test_two_runs_are_compared_with_one_command(corpus: Path, tmp_path: Path) -> None:
    for norm in ("layer", "rms"):
        fixed = {**TINY, "data": "text", "data.path": str(corpus), "norm": norm}
        args = [f"{k}={v}" for k, v in fixed.items()]
        assert run_program(*args, f"run_dir={norm}", cwd=tmp_path).returncode == 0
    result = run_program("layer", "rms", script="report", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    html = (tmp_path / "layer" / "report.html").read_text()
    assert "<td>rms-pre-bs4</td>" in html
    assert "norm.name" in html
    assert "from one seed: it may be chance" in html
    assert "residual: angle" in html


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", '{"norm": "layer"}'),
        ("summary.json", None),
        ("metrics.jsonl", '{"val_loss": 3.0, "val_bpb": 2.0}\n'),
        ("metrics.jsonl", '{"step": 0, "val_loss": "x", "val_bpb": "y"}\n'),
        ("stats.jsonl", '{"step": 1, "sites": 3}\n'),
        (
            "config.yaml",
            "a0: &a0 [x, x]\n"
            + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
        ),
    ],
)
def test_a_run_that_was_edited_is_one_line(folder: Path, name: str, content: str | None) -> None:
    path = folder / "rms-pre-bs4-s0" / name
    if content is None:
        content = json.dumps(json.loads(path.read_text()) | {"seed": "x"})
    path.write_text(content)
    result = run_program(str(folder), script="report")
    assert (result.returncode, result.stderr.count("\n")) == (65, 1), result.stderr
    assert "rms-pre-bs4-s0" in result.stderr


def test_of_two_copies_the_unchanged_one_counts(tmp_path: Path) -> None:
    for copy in "ab":
        summary(tmp_path / copy, "layer", 1, 3.0)
    path = tmp_path / "a" / "layer-pre-bs4-s1" / "summary.json"
    path.write_text(path.read_text().replace('"val_loss": 3.0', '"val_loss": 0.1'))
    (cell,) = make_cells(load_runs(tmp_path))
    assert cell.losses == {1: 3.0}


def test_a_run_in_a_linked_folder_is_reported(tmp_path: Path) -> None:
    summary(tmp_path / "elsewhere", "layer", 1, 3.0)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere" / "layer-pre-bs4-s1")
    assert len(load_runs(tmp_path / "here")) == 1


def test_a_report_never_writes_through_a_link(folder: Path) -> None:
    (folder / "mine").write_text("mine")
    for name in ("report.html", "losses.png"):
        (folder / name).symlink_to("mine")
    assert run_program(str(folder), script="report").returncode == 0
    assert (folder / "mine").read_text() == "mine"
