"""Statistics: right, per site, and without an effect on training."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt.config import Config
from gpt.placement import build_model
from gpt.probes.stats import (
    EDGES,
    MOMENTS,
    Record,
    angle,
    attention,
    collect,
    first_nonfinite,
    histogram,
    moments,
    spike_score,
    to_numbers,
    watch_update,
)
from gpt.training import trainer
from gpt.training.step import update
from gpt.training.trainer import train
from tests.tools.configs import curve, make_config, read_rows


def named(x: torch.Tensor) -> dict[str, float]:
    return dict(zip(MOMENTS, moments(x).tolist(), strict=True))


def test_moments_equal_float64_formulas() -> None:
    x = torch.randn(3, 4, 5) * 2 + 7
    x64 = x.double()
    centred, features = x64 - x64.mean(), x64.square().mean((0, 1))
    variance = centred.square().mean()
    expected = {
        "mean": x64.mean(),
        "std": variance.sqrt(),
        "rms": x64.square().mean().sqrt(),
        "absmax": x64.abs().max(),
        "skew": (centred**3).mean() / variance**1.5,
        "kurtosis": (centred**4).mean() / variance**2,
        "outliers": features.var(unbiased=False) / features.mean() ** 2,
        "absmax_to_median": x64.abs().max() / x64.abs().flatten().median(),
    }
    numbers = {name: value.item() for name, value in expected.items()}
    assert named(x) == pytest.approx(numbers, rel=1e-4, abs=1e-5)
    rows = x.mean(-1).flatten(), x.var(-1, correction=0).flatten()  # known for the rows
    by_rows = dict(zip(MOMENTS, moments(x, rows).tolist(), strict=True))
    assert by_rows == pytest.approx(numbers, rel=1e-4, abs=1e-5)


def test_a_gaussian_s_kurtosis_is_three_and_a_constant_s_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    gaussian = named(torch.randn(1000, 100, generator=generator))
    assert gaussian["kurtosis"] == pytest.approx(3, abs=0.05)
    assert gaussian["skew"] == pytest.approx(0, abs=0.05)
    assert gaussian["outliers"] == pytest.approx(0, abs=0.01)
    constant = named(torch.full((4, 4), 2.5))
    assert constant["kurtosis"] == constant["skew"] == constant["outliers"] == 0


@pytest.mark.parametrize("norm", ["batch", "rbn", "batch_pos"])
def test_the_gap_to_evaluation_is_that_before_the_batch_is_taken_in(norm: str) -> None:
    """Running statistics that include the batch would understate its gap."""
    model = build_model(make_config("data=pydoc", f"norm={norm}", "placement.embd_norm=true"), 61)
    idx = torch.randint(61, (4, 32), generator=torch.Generator().manual_seed(0))
    x = model.wte(idx) + model.wpe.weight
    expected = [float(v) for v in model.embd_norm.statistics(x).values()]  # type: ignore[operator]
    record: Record = {}
    with collect(model, record):
        model(idx, idx)
    found = to_numbers(record)["sites"]["embd_norm"]
    assert [found["tid_mean"], found["tid_std"]] == pytest.approx(expected, rel=1e-5)
    after = [float(v) for v in model.embd_norm.statistics(x).values()]  # type: ignore[operator]
    assert after != pytest.approx(expected, rel=1e-2)


def test_one_feature_that_is_large_is_an_outlier() -> None:
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 1000  # a massive activation
    assert named(x)["outliers"] == pytest.approx(63, rel=0.05)  # C − 1: one feature has all of it
    assert named(x)["absmax_to_median"] > 1000


def test_the_median_looks_at_every_feature_of_a_large_tensor() -> None:
    x = torch.randn(16, 1024, 768, generator=torch.Generator().manual_seed(0))
    x[..., 0] *= 100
    assert named(x)["absmax_to_median"] == pytest.approx(x.abs().max().item() / 0.675, rel=0.05)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_shape_of_a_distribution_does_not_depend_on_its_scale(scale: float) -> None:
    x = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
    for key in ("skew", "kurtosis", "outliers", "absmax_to_median"):
        assert named(x * scale)[key] == pytest.approx(named(x)[key], rel=1e-4), key
    torch.testing.assert_close(histogram(x * scale), histogram(x), rtol=0, atol=2e-3)


def test_a_histogram_is_shares_of_what_lies_where() -> None:
    x = torch.tensor([[-1.0, 1.0, 1.0, 1.0]])  # rms 1: bins of half a unit from −8
    shares = histogram(x)
    assert shares[14] == 0.25
    assert shares[18] == 0.75
    assert shares.sum() == 1
    assert histogram(torch.tensor([[float("nan"), 1.0]])).sum() == 1
    x = torch.zeros(1, 1000)
    x[0, :2] = torch.tensor([-1.0, 1.0])  # about 22 times the rms
    assert histogram(x)[[0, -1]].tolist() == pytest.approx([0.001, 0.001])
    x = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    counts, _ = np.histogram((x / x.square().mean().sqrt()).numpy(), EDGES)
    assert histogram(x).tolist() == pytest.approx((counts / x.numel()).tolist())


def test_attention_s_logit_and_entropy_are_those_of_its_softmax() -> None:
    q, k = torch.randn(2, 2, 5, 6)
    logit, entropy = attention(q, k, 2)
    heads = [t.view(2, 5, 2, 3).transpose(1, 2) for t in (q, k)]
    scores = heads[0] @ heads[1].mT / 3**0.5
    rows = [scores[..., t, : t + 1] for t in range(5)]  # what each token may look at
    assert logit.item() == pytest.approx(max(row.max().item() for row in rows))
    entropies = [torch.distributions.Categorical(logits=row).entropy().mean() for row in rows]
    torch.testing.assert_close(entropy, torch.stack(entropies).mean())


def test_the_angle_between_opposite_streams_is_one_and_to_itself_zero() -> None:
    x = torch.randn(2, 3, 4)
    assert angle(x, -x).item() == pytest.approx(1, abs=1e-6)
    assert angle(x, 2 * x).item() == pytest.approx(0, abs=1e-6)


def test_an_angle_far_below_the_rounding_of_its_cosine_is_told() -> None:
    small = torch.tensor(1e-5)
    x, y = torch.tensor([1.0, 0.0]), torch.stack([small.cos(), small.sin()])
    assert angle(x, y).item() == pytest.approx(1e-5 / math.pi, rel=1e-3)


def test_a_discrepancy_is_no_place_in_the_forward_pass() -> None:
    overflowed = torch.tensor(float("inf"))
    record = {
        ("sites", "final_norm", "tid_std"): overflowed,
        ("output", "logits", "log_z"): overflowed,
    }
    assert first_nonfinite(record) == "logits (log_z)"


def test_spikes_are_what_lies_six_deviations_off_the_128_before() -> None:
    calm = [(-1.0) ** i for i in range(200)]  # mean 0, deviation 1
    assert spike_score(calm) == 0
    calm[150] = 6.5
    assert spike_score(calm) == pytest.approx(1 / 72)
    assert spike_score([value + 9 for value in calm]) == pytest.approx(1 / 72)
    assert spike_score([1.0] * 128 + [9.0]) == 1
    assert spike_score([1.0, 99.0]) == 0


def test_layers_branches_and_logits_are_recorded() -> None:
    cfg = make_config("data=pydoc", "norm=dyt")
    model = build_model(cfg, 50)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randint(50, (2, 8))
    record: dict = {}
    with collect(model, record):
        logits, loss = model(x, x)
        loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.h[1].parameters()]).norm().item()
    weights = torch.cat([p.detach().flatten() for p in model.h[1].parameters()]).norm().item()
    with watch_update(model, record):
        optimizer.step()
    result = to_numbers(record)
    layer = result["layers"]["h.1"]
    assert layer["grad_norm"] == pytest.approx(gradient, rel=1e-5)
    assert layer["param_norm"] == pytest.approx(weights, rel=1e-5)
    assert layer["update_norm"] == pytest.approx(0.5 * gradient, rel=1e-4)
    assert set(result["layers"]) == {"wte", "wpe", "h.0", "h.1", "final_norm"}
    log_z = logits.logsumexp(-1).mean().item()
    assert result["output"]["logits"]["log_z"] == pytest.approx(log_z, rel=1e-5)
    branch, stream = result["branches"]["h.1.mlp"], result["residual"]["h.0"]
    assert branch["ratio"] == pytest.approx(branch["after"]["rms"] / stream["after"]["rms"])
    assert set(result["attention"]) == {"h.0.attn", "h.1.attn"}
    assert 0 < result["attention"]["h.1.attn"]["entropy"] < math.log(8)
    assert result["attention"]["h.1.attn"]["max_logit"] > 0
    assert 0 < result["residual"]["h.1"]["angle"] < 1
    site = result["sites"]["h.0.attn.in"]
    assert site["alpha_drift"] == site["gamma_drift"] == 0
    assert site["saturation"] == 0
    record: dict = {}
    with collect(model, record):
        model(x, x)
    assert to_numbers(record)["sites"]["final_norm"]["gamma_drift"] > 0


@pytest.mark.parametrize("norm", ["layer", "dummy", "batch"])
def test_every_site_and_depth_is_recorded(norm: str) -> None:
    model = build_model(make_config("data=pydoc", f"norm={norm}", "placement=peri"), 50)
    x = torch.randint(50, (2, 8))
    record: dict = {}
    with collect(model, record):
        model(x, x)[1].backward()
    result = to_numbers(record)
    slots = [
        f"h.{i}.{part}.{slot}" for i in (0, 1) for part in ("attn", "mlp") for slot in ("in", "out")
    ]
    assert set(result["sites"]) == {*slots, "final_norm"}
    assert list(result["residual"]) == ["embd", "h.0", "h.1"]
    final = result["sites"]["final_norm"]
    assert result["residual"]["h.1"]["after"] == pytest.approx(final["before"], rel=1e-5)
    assert sum(result["residual"]["h.1"]["histogram"]) == pytest.approx(1)
    assert set(final["before"]) == set(final["after"]) == set(MOMENTS)
    assert final["grad_norm"] > 0
    assert result["residual"]["h.0"]["grad_norm"] > 0
    if norm == "dummy":
        assert "gamma_norm" not in final
        assert final["before"] == final["after"]
    else:
        assert final["gamma_norm"] == pytest.approx(32**0.5)
        assert final["beta_norm"] == 0
        assert final["after"]["rms"] == pytest.approx(1, abs=0.05)


def test_the_gradient_at_an_identity_is_the_branch_s_alone() -> None:
    """dummy returns its input tensor, whose gradient also includes the residual path's."""
    model = build_model(make_config("data=pydoc", "norm=dummy"), 50)
    copying = build_model(make_config("data=pydoc", "norm=dummy"), 50)
    for block in copying.h:
        block.attn["in"].forward = lambda x: x * 1.0  # returns a new tensor
    x = torch.randint(50, (2, 8))
    norms = []
    for m in (model, copying):
        record: dict = {}
        with collect(m, record):
            m(x, x)[1].backward()
        norms.append(to_numbers(record)["sites"]["h.0.attn.in"]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_gradient_norms_do_not_depend_on_accumulation() -> None:
    model = build_model(make_config("data=pydoc"), 50)
    x = torch.randint(50, (2, 8))
    norms = []
    for accum in (1, 4):
        record: dict = {}
        with collect(model, record, grad_scale=accum):
            (model(x, x)[1] / accum).backward()
        norms.append(to_numbers(record)["sites"]["final_norm"]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_no_hook_is_left_behind_even_after_an_error() -> None:
    model = build_model(make_config("data=pydoc"), 50)
    with pytest.raises(RuntimeError, match="inside"), collect(model, {}):
        raise RuntimeError("inside")
    assert not any(m._forward_hooks for m in model.modules())


def test_the_first_site_that_is_not_finite_is_named() -> None:
    model = build_model(make_config("data=pydoc"), 50)
    model.h[1].mlp["in"].weight.data[3] = float("inf")
    record: dict = {}
    with collect(model, record):
        model(torch.randint(50, (2, 8)))
    assert first_nonfinite(record) == "h.1.mlp.in (after)"
    model.h[1].mlp["in"].weight.data[3] = 1
    model.h[0].mlp["in"].forward = lambda x: x / 0
    record.clear()
    with collect(model, record):
        model(torch.randint(50, (2, 8)))
    assert first_nonfinite(record) == "h.0.mlp.in (after)"


def test_statistics_are_taken_in_the_steps_that_ask_for_them_alone(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[set[str]] = []

    def watched(*args: Any) -> Any:
        row, record = update(*args)
        groups.append({group for group, *_ in record})
        return row, record

    monkeypatch.setattr(trainer, "update", watched)
    trainer.train(config("train.stats_every=3", "train.grad_accum=2"))
    every = {"sites", "residual", "branches", "attention", "output", "layers"}
    assert groups == [every, set(), every, set(), set(), every]


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
