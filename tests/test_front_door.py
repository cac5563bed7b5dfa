"""Use from Python: a notebook's names, custom training loops, models that are not ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import gpt
from gpt.common.errors import ConfigError
from gpt.config import Config, ModelConfig, OptimConfig, TrainConfig, WandbConfig
from gpt.norms import base
from gpt.norms.anneal import AnnealedLayerNorm
from gpt.norms.base import Norm, norm_step, norms_of
from gpt.norms.layer import LayerNorm
from gpt.norms.power import PowerNorm
from gpt.norms.prepbn import ProgressiveRepBatchNorm
from gpt.norms.rbn import RegularisedBatchNorm
from gpt.norms.registry import build_norm, sizes
from gpt.training.optimizer import lr_at, make_optimizer
from tests.tools.programs import run_program


def test_every_name_of_the_front_door_is_there() -> None:
    assert all(callable(getattr(gpt, name)) for name in gpt.HOMES)
    with pytest.raises(AttributeError, match="gpt has no 'trian'; it has compose"):
        gpt.trian  # noqa: B018


def test_the_tour_runs(tmp_path: Path) -> None:
    result = run_program(script="tour", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "tensor([[[0.8165" in result.stdout
    assert "final_norm   rms before" in result.stdout
    assert (tmp_path / "runs" / "tour" / "report.html").exists()


def test_a_configuration_s_groups_have_the_defaults_of_their_files() -> None:
    cfg = gpt.compose()
    assert cfg.model == ModelConfig()
    assert cfg.train == TrainConfig()
    assert cfg.optim == OptimConfig()
    assert cfg.wandb == WandbConfig()


def test_a_loop_of_one_s_own_trains_as_the_trainer_does(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    """The norms here need a schedule, running statistics and an extra loss."""
    for norm in ("rbn", "prepbn"):
        cfg = config(f"norm={norm}", f"run_dir={tmp_path}/{norm}", "optim.grad_clip=0")
        summary = gpt.train(cfg)
        data = gpt.prepare(cfg)
        model = gpt.build_model(cfg, data.tokenizer.n_vocab)
        batches = gpt.TrainBatches(data.train.ids, 4, 1, 32, cfg.seed)
        optimizer = make_optimizer(model, cfg.optim)
        losses = []
        for step in range(1, 7):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, 6, cfg.optim)
            with gpt.norm_step(model, step, 6) as norms:
                for x, y in batches.at(step, torch.device("cpu")):
                    loss = model(x, y)[1]
                    (loss + norms.extra_loss()).backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        assert sum(losses) / 6 == summary["train_loss"]
        trained = gpt.load_model(tmp_path / norm).state_dict()
        assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "norm",
    [AnnealedLayerNorm(4), ProgressiveRepBatchNorm(4), PowerNorm(4), RegularisedBatchNorm(4)],
    ids=lambda norm: type(norm).__name__,
)
def test_a_norm_that_needs_norm_step_says_so_once_outside_it(
    norm: Norm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "WARNED", set())
    x = torch.randn(2, 3, 4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        norm.eval()(x)
        with norm_step(norm, 1, 10):
            norm.train()(x)
        assert not told
        norm(x), norm(x)
    assert [str(w.message).split(" is trained")[0] for w in told] == [type(norm).__name__]


def test_a_plain_norm_needs_no_norm_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "WARNED", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpt.norms.BatchNorm(4)(torch.randn(2, 3, 4))
        gpt.norms.RMSNorm(4)(torch.randn(2, 3, 4))


def test_a_hook_that_is_misspelt_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"Late\.begin_steps is not a hook of Norm; expected begin_step"
    ):

        class Late(Norm):
            def begin_steps(self, step: int, steps: int) -> None: ...


def test_a_subclass_that_is_not_registered_is_a_norm_too() -> None:
    class Mine(LayerNorm):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Mine(4))
    assert [type(norm) for norm in norms_of(model)] == [Mine]
    with gpt.collect(model) as record:
        model(torch.randn(2, 3, 4)).sum().backward()
    assert set(gpt.to_numbers(record)["sites"]) == {"1"}


def test_a_model_that_is_not_ours_has_its_sites_or_one_line() -> None:
    theirs = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), gpt.norms.RMSNorm(4))
    with gpt.collect(theirs) as record:
        theirs(torch.randn(2, 3, 4)).square().sum().backward()
    sites = gpt.to_numbers(record)["sites"]
    assert set(sites) == {"1", "2"}
    assert sites["1"]["after"]["rms"] == pytest.approx(1, abs=0.01)
    assert sites["1"]["grad_norm"] > 0
    assert sites["1"]["gamma_norm"] == 2
    with pytest.raises(ConfigError, match="Sequential has no norm"), gpt.collect(nn.Sequential()):
        pass


def test_it_shows_its_options(norm_name: str) -> None:
    norm = build_norm(norm_name, 8, **sizes(norm_name, 4))
    shown = repr(norm)
    for option in ("eps", "momentum", "groups"):
        if option in vars(norm):
            assert f"{option}={getattr(norm, option)}" in shown
