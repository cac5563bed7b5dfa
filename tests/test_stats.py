"""Statistics: right, per site, and without a trace on training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt.config import Config
from gpt.placement import build_model
from gpt.stats import MOMENTS, collect, first_nonfinite, moments, table
from gpt.trainer import train
from tests.conftest import curve, make_config, read_rows


def test_moments_equal_float64_formulas() -> None:
    x = torch.randn(3, 4, 5) * 2 + 7
    x64 = x.double()
    centred = x64 - x64.mean()
    variance = centred.square().mean()
    expected = [
        x64.mean(),
        variance.sqrt(),
        x64.square().mean().sqrt(),
        x64.abs().max(),
        (centred**4).mean() / variance**2,
    ]
    torch.testing.assert_close(moments(x).double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_kurtosis_of_a_gaussian_is_three_and_of_a_constant_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    assert moments(torch.randn(100_000, generator=generator))[4].item() == pytest.approx(3, 0.05)
    assert moments(torch.full((4, 4), 2.5))[4].item() == 0


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_kurtosis_does_not_depend_on_scale(scale: float) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert moments(x * scale)[4].item() == pytest.approx(moments(x)[4].item(), rel=1e-4)


@pytest.mark.parametrize("norm", ["layer", "dummy", "batch"])
def test_every_site_and_depth_is_recorded(norm: str) -> None:
    model = build_model(make_config("data=pydoc", f"norm={norm}", "placement=peri"), 50)
    x = torch.randint(50, (2, 8))
    with collect(model, model.streams()) as record:
        model(x, x)[1].backward()
    result = table(record)
    slots = [
        f"h.{i}.{part}.{slot}" for i in (0, 1) for part in ("attn", "mlp") for slot in ("in", "out")
    ]
    assert set(result["sites"]) == {*slots, "head"}
    assert list(result["residual"]) == ["embd", "h.0", "h.1"]
    head = result["sites"]["head"]
    assert set(head["before"]) == set(head["after"]) == set(MOMENTS)
    assert head["grad_norm"] > 0
    assert result["residual"]["h.0"]["grad_norm"] > 0
    if norm == "dummy":
        assert "gamma_norm" not in head
        assert head["before"] == head["after"]
    else:
        assert head["gamma_norm"] == pytest.approx(32**0.5)
        assert head["beta_norm"] == 0
        assert head["after"]["rms"] == pytest.approx(1, abs=0.05)


def test_the_gradient_at_an_identity_is_the_branch_s_alone() -> None:
    """dummy returns its input, whose gradient also holds the residual path's."""
    model = build_model(make_config("data=pydoc", "norm=dummy"), 50)
    copying = build_model(make_config("data=pydoc", "norm=dummy"), 50)
    for block in copying.h:
        block.attn["in"].forward = lambda x: x * 1.0  # a tensor of its own
    x = torch.randint(50, (2, 8))
    norms = []
    for m in (model, copying):
        with collect(m, m.streams()) as record:
            m(x, x)[1].backward()
        norms.append(table(record)["sites"]["h.0.attn.in"]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_gradient_norms_do_not_depend_on_accumulation() -> None:
    model = build_model(make_config("data=pydoc"), 50)
    x = torch.randint(50, (2, 8))
    norms = []
    for accum in (1, 4):
        with collect(model, model.streams(), grad_scale=accum) as record:
            (model(x, x)[1] / accum).backward()
        norms.append(table(record)["sites"]["head"]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_no_hook_is_left_behind_even_after_an_error() -> None:
    model = build_model(make_config("data=pydoc"), 50)
    with pytest.raises(RuntimeError, match="inside"), collect(model, model.streams()):
        raise RuntimeError("inside")
    assert not any(m._forward_hooks for m in model.modules())


def test_the_first_site_that_is_not_finite_is_named() -> None:
    model = build_model(make_config("data=pydoc"), 50)
    model.h[1].mlp["in"].weight.data[3] = float("inf")
    with collect(model, model.streams()) as record:
        model(torch.randint(50, (2, 8)))
    assert first_nonfinite(record) == "h.1.mlp.in (gamma_norm)"


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_statistics_change_no_bit_of_training(
    config: Callable[..., Config], tmp_path: Path, norm: str
) -> None:
    for every in (0, 1):
        train(config(f"norm={norm}", f"train.stats_every={every}", f"run_dir={tmp_path}/{every}",
                     "model.dropout=0.1", "train.grad_accum=2"))  # fmt: skip
    assert curve(tmp_path / "0") == curve(tmp_path / "1")
    assert [row["step"] for row in read_rows(tmp_path / "1", "stats")] == [1, 2, 3, 4, 5, 6]
    assert read_rows(tmp_path / "0", "stats") == []
