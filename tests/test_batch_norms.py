"""BatchNorms: statistics once a step, discrepancy, folding; norms that change in training."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from gpt.common.errors import ConfigError
from gpt.config import Config
from gpt.norms.anneal import AnnealedLayerNorm
from gpt.norms.base import NormStep, norm_step, norms_of
from gpt.norms.batch import BatchNorm
from gpt.norms.power import PowerNorm
from gpt.norms.prepbn import ProgressiveRepBatchNorm
from gpt.norms.rbn import RegularisedBatchNorm
from gpt.norms.registry import build_norm
from gpt.placement import build_model
from gpt.sampling.fold import Affine, fold
from gpt.training.checkpoint import load_model
from gpt.training.trainer import train
from tests.tools.configs import make_config, mostly_long, read_rows
from tests.tools.programs import run_program

BATCH_NORMS = ["batch", "batch_ema", "rbn", "power", "repbn", "prepbn"]


@pytest.mark.parametrize("norm", [BatchNorm, PowerNorm])
def test_micro_batches_of_a_step_are_one_batch_to_the_running_statistics(
    norm: type[BatchNorm],
) -> None:
    x = torch.randn(8, 5, 7) * 3 + torch.arange(8.0).view(8, 1, 1)  # micro-batches differ
    whole, parts = norm(7).double(), norm(7).double()
    whole(x.double())
    parts.deferred = True
    for micro in x.double().split(2):
        parts(micro)
    assert parts.running_mean.eq(0).all()  # not yet
    parts.end_step()
    torch.testing.assert_close(parts.running_mean, whole.running_mean)
    torch.testing.assert_close(parts.running_var, whole.running_var)
    parts.end_step()  # no new batch: nothing changes
    torch.testing.assert_close(parts.running_var, whole.running_var)


def test_accumulation_updates_running_statistics_once_a_step(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    """torch's BatchNorm would update them grad_accum times (pytorch#46516)."""
    frozen = ["optim.lr=0", "optim.min_lr=0", "train.steps=1", "train.stats_every=0", "norm=batch"]
    means = []
    for accum, batch_size in ((1, 8), (4, 2)):
        run_dir = tmp_path / str(accum)
        train(config(*frozen, f"train.grad_accum={accum}", f"train.batch_size={batch_size}",
                     f"run_dir={run_dir}"))  # fmt: skip
        means.append(load_model(run_dir).h[0].attn["in"].running_mean)
    torch.testing.assert_close(means[0], means[1], rtol=1e-4, atol=1e-6)


def test_the_discrepancy_is_that_of_regularised_batch_norm_s_paper() -> None:
    norm = BatchNorm(2, eps=1e-12).double()
    norm.running_mean.copy_(torch.tensor([1.0, 0.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0]))
    x = torch.tensor([[[0.0, -1.0], [2.0, 3.0]]]).double()  # means 1, 1; biased deviations 1, 2
    tid_mean, tid_std = norm.statistics(x).values()
    assert tid_mean.item() == pytest.approx((0 / 1 + 1 / 2) / 2)
    assert tid_std.item() == pytest.approx((abs(2 / 1 - 1) + abs(1 / 2 - 1)) / 2)
    power = PowerNorm(2, eps=1e-12).double()
    power.running_var.copy_(torch.tensor([18.0, 20.0]))  # the mean squares are 2 and 5
    assert [t.item() for t in power.statistics(x).values()] == pytest.approx(
        [0, (3 - 1 + 2 - 1) / 2]
    )


def test_statistics_hold_the_discrepancy_of_every_site(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    train(config("norm=batch"))
    sites = read_rows(tmp_path / "run", "stats")[-1]["sites"]
    assert all(entry["tid_mean"] > 0 and entry["tid_std"] > 0 for entry in sites.values())
    assert len(sites) == 5
    evaluations = [r for r in read_rows(tmp_path / "run") if "val_loss" in r]
    assert all(r["val_loss_batch_stats"] != r["val_loss"] for r in evaluations)


def test_short_samples_leave_the_statistics_of_later_positions_as_they_were() -> None:
    norm = build_norm("batch_pos", 3, block_size=4)
    for micro_batches in (1, 2) * 100:
        norm.deferred = True
        for _ in range(micro_batches):
            norm(torch.randn(2, 1, 3))
        norm.end_step()
    torch.testing.assert_close(norm.running_var[1:], torch.ones(3, 3))
    assert torch.equal(norm.running_mean[1:], torch.zeros(3, 3))
    assert not torch.equal(norm.running_mean[0], torch.zeros(3))


def test_a_batch_of_one_trains_and_says_what_its_statistics_are(
    config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    assert math.isfinite(train(config("norm=batch", "train.batch_size=1"))["val_loss"])
    assert "the statistics are those of one sample" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("norm", "also", "message"),
    [
        ("batch", "model.block_size=1", "raise train.batch_size or model.block_size$"),
        ("layer", "placement.final_norm=batch_pos", "norm=batch_pos: .* raise train.batch_size$"),
    ],
)
def test_a_batch_of_one_value_is_refused(
    norm: str, also: str, message: str, config: Callable[..., Config]
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config(f"norm={norm}", "train.batch_size=1", also))


FOLDED = list(product(BATCH_NORMS, ["pre", "peri", "subln", "hybrid", "parallel", "lns", "post"]))


@pytest.mark.parametrize(
    ("norm", "placement"),
    mostly_long(FOLDED, *((n, p) for n, p in FOLDED if n == "batch" or p == "pre")),
)
def test_folded_norms_give_the_same_logits(norm: str, placement: str) -> None:
    model = build_model(make_config("data=pydoc", f"norm={norm}", f"placement={placement}"), 61)
    generator = torch.Generator().manual_seed(0)
    for module in norms_of(model):
        for parameter in module.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        module.begin_step(100, 100)  # prepbn's share of RMSNorm is now 0
    idx = torch.randint(61, (4, 32), generator=generator)
    for _ in range(3):
        model.train()(idx)
    model = model.double().eval()
    expected = model(idx)[0]
    count = len(norms_of(model))
    counts = fold(model)
    torch.testing.assert_close(model(idx)[0], expected, rtol=1e-9, atol=1e-10)
    assert counts["kept"] == 0
    assert counts["folded"] + counts["affine"] == count
    assert sum(isinstance(m, Affine) for m in model.modules()) == counts["affine"]
    assert counts["folded"] > 0 or placement == "post"


def test_a_norm_that_looks_at_its_input_is_not_folded() -> None:
    model = build_model(make_config("data=pydoc", "norm=layer"), 61)
    assert fold(model) == {"folded": 0, "affine": 0, "kept": 5}


def test_a_norm_of_torch_s_whose_affine_is_a_flag_is_not_folded() -> None:
    model = build_model(make_config("data=pydoc", "placement=post"), 61)
    model.h[0].attn["after"] = nn.GroupNorm(1, 32)  # type: ignore[index]
    assert fold(model)["kept"] == 4


def test_sampling_folds_on_request_and_says_the_same(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    cfg = make_config("data=text", f"data.path={corpus}", "norm=batch", f"run_dir={run_dir}")
    train(cfg)
    texts = []
    for fold_ in ("false", "true"):
        result = run_program(f"run_dir={run_dir}", "prompt=the ", "max_new_tokens=20",
                             f"fold={fold_}", script="sample")  # fmt: skip
        assert result.returncode == 0, result.stderr
        texts.append(result.stdout)
    assert texts[0] == texts[1]
    assert result.stderr == "norms: 4 folded into Linears, 1 left as a multiply-add, 0 kept\n"


# --- norms that change while training -----------------------------------------------------------


def test_prepbn_goes_from_rms_norm_to_repbn() -> None:
    norm, x = ProgressiveRepBatchNorm(5, fraction=0.5), torch.randn(2, 3, 5)
    norm.begin_step(1, 100)
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (5,), None, 1e-5))
    norm.begin_step(26, 101)
    assert norm.share == 0.5
    assert norm.as_affine() is None
    norm.begin_step(51, 101)
    bn = nn.BatchNorm1d(5)
    expected = bn(x.flatten(0, 1)).view_as(x) + x
    torch.testing.assert_close(norm(x), expected)


def test_annealing_ends_in_a_division_by_a_constant() -> None:
    norm, x = AnnealedLayerNorm(5, start=0.2, end=0.8), torch.randn(2, 3, 5) * 4
    norm.begin_step(1, 10)
    torch.testing.assert_close(norm(x), nn.LayerNorm(5)(x))
    std = (x.var(-1, unbiased=False) + 1e-5).sqrt().mean()
    torch.testing.assert_close(norm.running_std, std)
    norm(3 * x)  # σ̄ is now the mean of σ and 3σ
    torch.testing.assert_close(norm.running_std, 2 * std)
    norm(2 * x)  # the mean of σ, 3σ and 2σ
    torch.testing.assert_close(norm.running_std, 2 * std)
    std = norm.running_std.clone()
    norm.begin_step(9, 11)  # 80% of the steps are done
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(norm(2 * x), 2 * centred / std)  # σ̄ is fixed: it is linear now
    torch.testing.assert_close(norm.running_std, std)
    norm.begin_step(6, 11)
    assert norm.fade.item() == pytest.approx(0.5)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_schedule_over_the_whole_training_is_done_in_its_last_step(steps: int) -> None:
    anneal, prepbn = (
        AnnealedLayerNorm(3, start=0.1, end=1.0),
        ProgressiveRepBatchNorm(3, fraction=1),
    )
    for norm in (anneal, prepbn):
        norm.begin_step(max(steps, 2), max(steps, 2))
    assert anneal.fade == 1
    assert prepbn.share == 0


def test_annealing_and_power_norm_see_micro_batches_as_one_batch() -> None:
    x, dy = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    for make in (lambda: AnnealedLayerNorm(7), lambda: PowerNorm(7, warmup_steps=0)):
        whole, parts = make().double(), make().double()
        for (norm, pieces), _ in product(((whole, 1), (parts, 4)), range(2)):
            with norm_step(norm, 1, 10, micro_batches=pieces):
                for micro, gradient in zip(x.chunk(pieces), dy.chunk(pieces), strict=True):
                    norm(micro.clone().requires_grad_()).backward(gradient)
        for (name, a), b in zip(whole.named_buffers(), parts.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)
        assert any(b.dim() and b.abs().sum() > 0 for b in whole.buffers()) or whole.running_std > 0


def test_rbn_s_penalty_pulls_both_the_mean_and_the_variance() -> None:
    """Checks its gradient against finite differences."""
    for weights in (
        {"mean_weight": 2.0, "var_weight": 0.0},
        {"mean_weight": 0.0, "var_weight": 3.0},
    ):
        norm = RegularisedBatchNorm(3, **weights).double()
        norm.deferred = True
        x = (torch.randn(2, 4, 3).double() + 0.5).requires_grad_()

        def penalty(x: torch.Tensor, norm: RegularisedBatchNorm = norm) -> torch.Tensor:
            norm(x)
            return norm.extra_loss()

        assert torch.autograd.gradcheck(penalty, x)
        (gradient,) = torch.autograd.grad(penalty(x), x)
        assert gradient.abs().max() > 0.01


def test_running_statistics_in_float64_are_exact() -> None:
    """Their momentum is 0.1, and not 0.1 rounded to float32."""
    ours, theirs = BatchNorm(5).double(), nn.BatchNorm1d(5).double()
    ours.deferred = True
    power, square = PowerNorm(5).double(), torch.ones(5).double()
    power.deferred = True
    for _ in range(3):
        x = torch.randn(8, 4, 5).double() * 3 + 2
        ours(x), power(x)
        ours.end_step(), power.end_step()
        theirs(x.flatten(0, 1))
        square += 0.1 * (x.square().mean((0, 1)) - square)
    exactly = {"rtol": 1e-14, "atol": 1e-14}
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, **exactly)
    torch.testing.assert_close(ours.running_var, theirs.running_var, **exactly)
    torch.testing.assert_close(power.running_var, square, **exactly)


def test_rbn_s_penalty_is_minimised_and_not_logged(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    norm, x = RegularisedBatchNorm(2, mean_weight=2.0, var_weight=3.0), torch.zeros(1, 2, 2)
    x[0, :, 0] = torch.tensor([1.0, 3.0])  # means 2, 0; biased variances 1, 0
    norm.running_mean[0] = 0.5  # the other is 0; running variances are 1
    norm(x)
    assert float(NormStep([norm]).extra_loss()) == pytest.approx(2 * (1.5**2 + 0) + 3 * (0 + 1))
    for weight in (0, 10):
        train(config("norm=rbn", f"norm.mean_weight={weight}", f"norm.var_weight={weight}",
                     f"run_dir={tmp_path}/{weight}"))  # fmt: skip
    losses = [[r["loss"] for r in read_rows(tmp_path / str(w)) if "loss" in r] for w in (0, 10)]
    assert losses[0][0] == losses[1][0]
    off = [
        read_rows(tmp_path / str(w), "stats")[-1]["sites"]["final_norm"]["tid_mean"]
        for w in (0, 10)
    ]
    assert off[1] < 0.9 * off[0]


def test_power_norm_s_warm_up_ends_after_its_steps() -> None:
    norm, x = PowerNorm(4, warmup_steps=2, eps=1e-12), torch.randn(2, 3, 4)
    norm.deferred = True
    for step, psi in ((2, x.square().mean((0, 1))), (3, torch.ones(4))):
        norm.begin_step(step, 10)
        torch.testing.assert_close(norm(x), x / psi.sqrt())


def test_power_norm_after_its_warm_up_is_the_paper_s_algorithm() -> None:
    """Forward with the running ψ, backward with Γ, Λ and ν, written out for three steps."""
    norm = PowerNorm(4, momentum=0.1, warmup_steps=0, eps=1e-12).double()
    norm.deferred = True
    psi2, nu = torch.ones(4).double(), torch.zeros(4).double()
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2, 3):
        norm.begin_step(step, 10)
        x, dy = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
        x.requires_grad_()
        y = norm(x)
        y.backward(dy)
        norm.end_step()
        with torch.no_grad():
            x_hat = x / psi2.sqrt()
            torch.testing.assert_close(y, x_hat)  # γ = 1, β = 0
            torch.testing.assert_close(x.grad, (dy - nu * x_hat) / psi2.sqrt())
            gamma, lam = x_hat.square().mean((0, 1)), (dy * x_hat).mean((0, 1))
            nu = nu * (1 - 0.1 * gamma) + 0.1 * lam
            psi2 = 0.9 * psi2 + 0.1 * x.square().mean((0, 1))
    torch.testing.assert_close(norm.running_var, psi2)
    torch.testing.assert_close(norm.nu, nu)
