"""Cards: every norm has one, and its numbers are those of the design's worked example."""

from __future__ import annotations

import pytest

from gpt.norms.registry import NORMS
from gpt.probes import cards
from tests.tools.configs import BUILDABLE
from tests.tools.programs import run_program


def lines(name: str) -> list[str]:
    return [line for part in cards.card(name) for line in part]


def test_every_norm_has_a_card(norm_name: str) -> None:
    text = "\n".join(lines(norm_name))
    assert text.startswith(f"{norm_name}: {NORMS[norm_name].__name__}\n")
    assert "in training: " in text
    assert "the norm's output at the start of training" in text


def line(name: str, start: str) -> list[float]:
    found = next(row for row in lines(name) if row.strip().startswith(start))
    return [float(word) for word in found.split() if word.lstrip("-").replace(".", "").isdigit()]


def test_layer_norm_takes_row_means_and_batch_norm_column_means() -> None:
    assert line("layer", "mean") == [2, 5, 8]
    assert line("batch", "mean") == [4, 5, 6]
    assert line("layer", "biased variance") == pytest.approx([2 / 3] * 3, abs=1e-3)
    assert line("layer", "unbiased variance") == [1, 1, 1]
    assert line("batch", "biased variance") == [6, 6, 6]


def test_gamma_s_gradient_on_the_card_is_the_sum_over_tokens() -> None:
    """A column of x̂ is (−1.225, 0, 1.225); those of dy are (1, 0, 2), (0, 1, 0), (−1, 0, 1)."""
    assert line("batch", "dL/dγ") == pytest.approx([1.225, 0, 2.449], abs=2e-3)
    assert line("batch", "dL/dβ") == [3, 1, 0]


def test_the_card_shows_why_batch_norm_fails_on_one_sample() -> None:
    # Token C gives (7 − 4)/√9: the running variance is unbiased, so 9 and not 6.
    assert line("batch", "with running statistics") == [1, 1, 1]
    assert line("batch", "with its own, a batch of one") == [0, 0, 0]


def test_the_drawing_shows_rows_and_columns() -> None:
    assert list(cards.drawing("in training", ("C",), 2))[4].endswith("■ ◆ · ·     · · · ·")
    assert list(cards.drawing("in training", ("C",), 1))[4].endswith("■ ◆ ■ ■     · · · ·")
    assert list(cards.drawing("in training", ("B", "T"), 1))[3:6] == [
        "  token 1   · ■ · ·     · ■ · ·",
        "  token 2   · ◆ · ·     · ■ · ·",
        "  token 3   · ■ · ·     · ■ · ·",
    ]


def test_a_norm_that_fades_says_what_evaluation_looks_at_meanwhile() -> None:
    text = "\n".join(lines("prepbn"))
    assert "in evaluation: the statistics of ◆ are taken over it and every ■ (C)" in text


@pytest.mark.parametrize(
    ("name", "count"), [("layer", "2C"), ("derf", "2C + 2"), ("dummy", "0"), ("scale", "1")]
)
def test_parameters_are_counted(name: str, count: str) -> None:
    assert cards.parameters(name) == count


def test_the_program_lists_all_norms_and_compares_two() -> None:
    result = run_program(script="norms")
    assert result.returncode == 0, result.stderr
    assert all(f" {name} " in result.stdout for name in BUILDABLE)
    assert result.stderr == ""  # no warning: its norms run inside a step
    both = run_program("--compare", "layer", "batch", script="norms").stdout
    assert "layer: LayerNorm" in both
    assert "│  batch: BatchNorm" in both
    assert "token 1   · · · ·     · · · ·  " in both  # the drawings are side by side
    assert "-0.000" not in both
    assert run_program("prepbn", script="norms").stderr == ""
    wrong = run_program("batc", script="norms")
    assert wrong.returncode == 78
    assert "did you mean 'batch'" in wrong.stderr
