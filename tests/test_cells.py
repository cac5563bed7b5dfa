"""Runs become cells and cells are compared: intervals, pairs by seed, baselines, learning rates."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gpt.reports import tables
from gpt.reports.cells import (
    Baseline,
    baseline,
    difference,
    in_order,
    interval,
    make_cells,
    ordered,
    tuned,
)
from gpt.reports.runs import load_runs, unsaid
from tests.tools.made_runs import summary
from tests.tools.programs import run_program


def test_the_interval_is_student_s() -> None:
    mean, half = interval([3.0, 3.2, 3.4])
    assert mean == pytest.approx(3.2)
    assert half == pytest.approx(4.302653 * 0.2 / math.sqrt(3), rel=1e-6)
    assert interval([1.5]) == (1.5, None)


def test_differences_are_paired_by_seed(folder: Path) -> None:
    """Seeds vary by 0.2, which hides a difference of 0.1; pairing by seed shows it."""
    cells = make_cells(load_runs(folder))
    rms = next(c for c in cells if c.norm == "rms")
    paired = difference(rms, next(c for c in cells if c.norm == "layer"))
    assert paired is not None
    mean, half, pairs = paired
    assert mean == pytest.approx(-0.31 / 3)
    assert half == pytest.approx(4.302653 * 0.0057735 / math.sqrt(3), rel=1e-3)
    assert pairs == 3


def test_a_seed_that_diverged_moves_no_pair(tmp_path: Path) -> None:
    """The remaining runs are still paired by seed, not by order."""
    for seed, layer, rms in ((1, 3.0, None), (2, 4.0, 4.1), (3, 5.0, 5.1)):
        summary(tmp_path, "layer", seed, layer)
        summary(tmp_path, "rms", seed, rms, **({} if rms else {"diverged_at": 7}))
    layer, rms = sorted(make_cells(load_runs(tmp_path)), key=lambda c: c.norm)
    assert difference(rms, layer) == pytest.approx((0.1, 0.0, 2), abs=1e-12)
    assert difference(layer, rms) == pytest.approx((-0.1, 0.0, 2), abs=1e-12)


@pytest.mark.parametrize(
    ("spread", "verdict"),
    [(0.039, "worse beyond chance."), (0.042, "no difference that these seeds can show.")],
)
def test_beyond_chance_means_that_the_whole_interval_excludes_zero(
    spread: float, verdict: str, tmp_path: Path
) -> None:
    """Differences of 0.1 ± 2.484 spread: the interval's end is just above 0, or just below."""
    for seed, sign in ((1, -1), (2, 0), (3, 1)):
        summary(tmp_path, "layer", seed, 3.0)
        summary(tmp_path, "rms", seed, 3.1 + sign * spread)
    layer, rms = sorted(make_cells(load_runs(tmp_path)), key=lambda c: c.norm)
    paired = difference(rms, layer)
    assert paired is not None
    assert paired[1] == pytest.approx(4.302653 * spread / math.sqrt(3))
    assert tables.compared(rms, layer).endswith(verdict)


def test_the_baseline_differs_in_nothing_but_the_norm(tmp_path: Path) -> None:
    """It is never a lucky variant of layer, a variant that leaks, or one on another text."""
    for seed in (1, 2, 3):
        for norm, eps, loss in (
            ("layer", 1e-5, 3.0), ("layer", 0.001, 2.5), ("rms", 0.001, 2.6), ("rms", 1e-5, 3.2),
        ):  # fmt: skip
            summary(tmp_path / str(eps), norm, seed, loss, {"norm.eps": eps})
    cells = make_cells(load_runs(tmp_path))
    found = {c.label: baseline(c, cells, Baseline()) for c in cells if c.traits["norm"] == "rms"}
    assert {a: b and b.label for a, b in found.items()} == {
        "rms-pre-bs4 norm.eps=1e-05": "layer-pre-bs4 norm.eps=1e-05",
        "rms-pre-bs4 norm.eps=0.001": "layer-pre-bs4 norm.eps=0.001",
    }
    summary(tmp_path / "leak", "layer", 1, 1.0, sees_in_evaluation=["later tokens"])
    summary(tmp_path / "leak", "rms", 1, 2.0)
    cells = make_cells(load_runs(tmp_path / "leak"))
    assert all(baseline(c, cells, Baseline()) is None for c in cells)
    summary(tmp_path / "texts", "layer", 1, 1.0)
    summary(tmp_path / "texts", "rms", 1, 2.0, corpus_sha256="1" * 64)
    cells = make_cells(load_runs(tmp_path / "texts"))
    assert all(baseline(c, cells, Baseline()) is None for c in cells)
    assert "Tokenizers or texts differ" in tables.plain_words(cells, Baseline())[0]


def test_another_split_of_a_text_has_tokens_of_its_own(tmp_path: Path) -> None:
    for train_bytes in (900, 901):
        summary(tmp_path / str(train_bytes), "layer", 1, 3.0, train_bytes=train_bytes)
    cells = make_cells(load_runs(tmp_path))
    assert {cell.unit for cell in cells} == {"val_bpb"}


def test_each_norm_is_compared_at_its_own_best_learning_rate(tmp_path: Path) -> None:
    """layer is best at 0.1, rms at 0.3: at one shared rate one of them would lose by it."""
    losses = {("layer", 0.1): 3.0, ("layer", 0.3): 3.5, ("rms", 0.1): 3.6, ("rms", 0.3): 2.9}
    for (norm, lr), loss in losses.items():
        for seed in (1, 2):
            summary(tmp_path / str(lr), norm, seed, loss + seed / 10, {"optim.lr": lr})
    # One easy seed: its mean is below that of 0.3, but on this seed 0.3 has the lower loss.
    summary(tmp_path / "0.2", "rms", 1, 3.02, {"optim.lr": 0.2})
    cells = make_cells(load_runs(tmp_path))
    best = {c.norm: c for c in tuned(cells)}
    assert {n: (c.lr, c.rates) for n, c in best.items()} == {
        "layer": (0.1, (0.1, 0.3)),
        "rms": (0.3, (0.1, 0.2, 0.3)),
    }
    paired = difference(best["rms"], best["layer"])
    assert paired is not None
    assert paired[0] == pytest.approx(-0.1)
    words = "\n".join(tables.plain_words(cells, Baseline()))
    assert "rms-pre-bs4 optim.lr=0.3 against layer-pre-bs4 optim.lr=0.1: -0.1000" in words
    assert "rms-pre-bs4 optim.lr=0.1 against" not in words
    edges = words.split("Best at the ")[1:]
    assert "lowest" in edges[0]
    assert "layer-pre-bs4 optim.lr=0.1." in edges[0]
    assert "highest" in edges[1]
    assert "rms-pre-bs4 optim.lr=0.3." in edges[1]
    rows = {row["cell"]: row for row in tables.comparison(cells, Baseline())}
    assert len(rows) == 5  # the table has all of them
    assert rows["rms-pre-bs4 optim.lr=0.1"]["best learning rate"] == ""
    assert rows["rms-pre-bs4 optim.lr=0.3"]["best learning rate"] == "yes"


def test_names_are_ordered_by_the_size_of_their_numbers() -> None:
    assert ordered({"pre-bs16", "pre-bs2", "post-bs4"}) == ["post-bs4", "pre-bs2", "pre-bs16"]
    assert ordered({"wd=0.1", "wd=0.05", "wd=1e-3"}) == ["wd=1e-3", "wd=0.05", "wd=0.1"]


def test_of_equal_runs_one_counts_whatever_its_loss(tmp_path: Path) -> None:
    for folder, loss in (("a", 3.0), ("b", 2.0), ("c", 4.0)):
        summary(tmp_path / folder, "layer", 1, loss)
    (cell,) = make_cells(load_runs(tmp_path))
    assert cell.losses == {1: 3.0}
    result = run_program(str(tmp_path), script="report")
    assert "Runs with the settings and seed of another run left out: 2." in result.stdout


def test_options_of_a_norm_are_lines_of_their_own(tmp_path: Path) -> None:
    for groups in (2, 4):
        summary(tmp_path / str(groups), "group", 1, 3.0 + groups, {"norm.groups": groups})
    cells = make_cells(load_runs(tmp_path))
    assert [c.norm for c in cells] == ["group norm.groups=2", "group norm.groups=4"]
    assert {c.context for c in cells} == {"pre-bs4"}


def test_a_key_that_only_some_runs_have_is_named_on_those(tmp_path: Path) -> None:
    for name in (None, "rms"):
        summary(tmp_path / str(name), "layer", 1, 3.0, {"init.swap_norm": name})
    labels = {cell.label for cell in make_cells(load_runs(tmp_path))}
    assert labels == {"layer-pre-bs4", "layer-pre-bs4 init.swap_norm=rms"}


def test_rates_that_each_lost_another_seed_are_ranked_by_the_seed_that_both_have(
    tmp_path: Path,
) -> None:
    for rate, losses in ((1e-3, (2.0, None, 2.5)), (3e-3, (None, 2.9, 2.4))):
        for seed, loss in enumerate(losses):
            folder = tmp_path / str(rate)
            more = {"diverged_at": 3} if loss is None else {}
            summary(folder, "layer", seed, loss, {"optim.lr": rate}, **more)
    (best,) = tuned(make_cells(load_runs(tmp_path)))
    assert best.lr == 3e-3


@pytest.mark.parametrize("key", ["corpus_sha256", "init_sha256", "norm_sha256"])
def test_runs_made_of_different_things_are_no_cell(key: str, tmp_path: Path) -> None:
    """Their configurations agree, but the text, initial weights or the norm's code differ."""
    for seed, digest in ((1, "a"), (2, "a"), (3, "b")):
        summary(tmp_path, "layer", seed, 3.0, **{key: digest * 64})
    assert [len(cell.runs) for cell in make_cells(load_runs(tmp_path))] == [2, 1]


def test_labels_name_what_most_runs_have_not(tmp_path: Path) -> None:
    """The three rms runs differ in eps, so all labels name it; a swept rate has no majority."""
    runs = [("layer", 1e-5, 0.1), ("layer", 1e-5, 0.3), ("layer", 1e-3, 0.1)]
    runs += [("rms", eps, lr) for eps, lr in ((1e-6, 0.3), (1e-5, 0.1), (1e-3, 0.3))]
    for i, (norm, eps, lr) in enumerate(runs):
        config = {"norm.eps": eps, "optim.lr": lr, "optim.beta1": 0.8 if i == 5 else 0.9}
        summary(tmp_path / str(i), norm, 1, 3.0, config)
    labels = {cell.label for cell in make_cells(load_runs(tmp_path))}
    assert labels == {
        "layer-pre-bs4 optim.lr=0.1",
        "layer-pre-bs4 optim.lr=0.3",
        "layer-pre-bs4 norm.eps=0.001 optim.lr=0.1",
        "rms-pre-bs4 norm.eps=1e-06 optim.lr=0.3",
        "rms-pre-bs4 norm.eps=1e-05 optim.lr=0.1",
        "rms-pre-bs4 norm.eps=0.001 optim.beta1=0.8 optim.lr=0.3",
    }
    said = "Unless a name says otherwise: norm.eps=1e-05 (layer), optim.beta1=0.9."
    assert unsaid(load_runs(tmp_path)) == said


def test_words_say_where_a_comparison_is_not_between_equals(tmp_path: Path) -> None:
    rates = {"layer": (0.1, 0.3), "rms": (0.1, 0.3), "dummy": (0.1, 1.0), "batch": (0.1,)}
    for norm, tried in rates.items():
        for lr in tried:
            summary(tmp_path / str(lr), norm, 1, 3.0 + lr, {"optim.lr": lr})
    cells = make_cells(load_runs(tmp_path))
    words = {line.split("-")[0]: line for line in tables.plain_words(cells, Baseline())}
    assert words["rms"].endswith("from one seed: it may be chance.")
    assert "They had different learning rates to choose from." in words["dummy"]
    assert "Learning rates tried: 1 against 2." in words["batch"]
    text = "\n".join(words.values())
    assert "Each is compared at the learning rate that was best for it" in text
    assert "batch" not in text.split("Best at the lowest")[1].split("\n")[0]  # it had only one rate
    assert "Devices differ" not in text
    summary(tmp_path / "gpu", "l2", 1, 3.0, {"optim.lr": 0.1}, device="cuda:0")
    words_now = tables.plain_words(make_cells(load_runs(tmp_path)), Baseline())
    assert any("Devices differ" in line for line in words_now)


def test_a_cell_s_row_has_the_numbers_of_its_runs(tmp_path: Path) -> None:
    for seed, (loss, speed, memory) in enumerate([(3.0, 900.0, 7), (3.2, 1100.0, 5)]):
        more = {"tokens_per_s": speed, "peak_memory": memory * 2**20, "params": 12_345}
        summary(tmp_path, "layer", seed, loss, **more)
    (row,) = tables.comparison(make_cells(load_runs(tmp_path)), Baseline())
    assert row["val loss"] == "3.1000 ± 1.2706"
    assert row["bits/byte"] == "1.5500 ± 0.6353"
    assert (row["tokens/s"], row["peak memory"], row["parameters"]) == ("1,000", "5 MiB", "12,345")


def test_unsaid_values_keep_their_place_in_the_order(tmp_path: Path) -> None:
    for i, layers in enumerate((2, 4, 4, 4, 8, 16)):
        summary(tmp_path / str(i), "layer", i, 3.0, {"model.n_layer": layers, "optim.lr": 0.1})
    contexts = [cell.context for cell in in_order(make_cells(load_runs(tmp_path)))]
    assert contexts == [
        "pre-bs4 model.n_layer=2", "pre-bs4 model.n_layer=4", "pre-bs4 model.n_layer=8",
        "pre-bs4 model.n_layer=16",
    ]  # fmt: skip
    summary(tmp_path / "6", "layer", 6, 3.0, {"model.n_layer": 4, "optim.lr": 0.1})
    contexts = [cell.context for cell in in_order(make_cells(load_runs(tmp_path)))]
    assert contexts[:3] == ["pre-bs4 model.n_layer=2", "pre-bs4", "pre-bs4 model.n_layer=8"]


def test_a_run_of_unknown_configuration_is_not_taken_for_a_usual_one(tmp_path: Path) -> None:
    for i, beta1 in enumerate((0.8, 0.9, 0.9, 0.9)):
        summary(tmp_path / str(i), "layer", i, 3.0, {"optim.beta1": beta1, "optim.beta2": 0.99})
    assert unsaid(load_runs(tmp_path))
    summary(tmp_path / "x", "layer", 7, 9.0)
    (tmp_path / "x" / "layer-pre-bs4-s7" / "config.yaml").unlink()
    assert not unsaid(load_runs(tmp_path))
    sizes = {cell.label: len(cell.runs) for cell in make_cells(load_runs(tmp_path))}
    assert sizes == {
        "layer-pre-bs4 optim.beta1=0.8": 1, "layer-pre-bs4 optim.beta1=0.9": 3, "layer-pre-bs4": 1,
    }  # fmt: skip
