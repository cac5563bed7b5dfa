"""A run that diverges: no weight changes, and the site where it began is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.common.errors import Diverged
from gpt.config import Config
from gpt.data.batches import TrainBatches
from gpt.data.tokens import prepare
from gpt.norms.base import Norm
from gpt.norms.batch import BatchNorm
from gpt.norms.registry import NORMS
from gpt.probes.verdict import Sight
from gpt.training.checkpoint import TrainState
from gpt.training.screen import Screen
from gpt.training.step import Row, first_not_finite, read, update, where_not_finite
from gpt.training.trainer import Run, set_up, train
from tests.tools.configs import read_rows
from tests.tools.programs import run_program


def test_steps_after_the_first_that_is_not_finite_are_not_told() -> None:
    """An accelerator has taken these steps before their losses are read."""
    losses = [2.0, math.nan, 1.0, 1.0]
    rows = [Row(i, 1e-3, torch.tensor(loss), torch.tensor(1.0)) for i, loss in enumerate(losses)]
    assert [row["step"] for row in read(rows)] == [0, 1]
    assert len(read(rows[2:])) == 2


def test_a_run_that_diverges_stops_before_the_update_and_names_step_and_site(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt.norms.layer import LayerNorm
    from gpt.training import trainer
    from gpt.training.checkpoint import checkpoints, load_model

    calls = {"train": -math.inf}
    forward, probe = LayerNorm.forward, trainer.probe

    def probed(*args: Any) -> Sight:
        sight = probe(*args)
        calls["train"] = 0  # count from here on: the probe is not training
        return sight

    def poisoned(self: LayerNorm, x: torch.Tensor) -> torch.Tensor:
        y = forward(self, x)
        if self.training and x.requires_grad:
            calls["train"] += 1
        if self.training and calls["train"] > 5 * 4 and hasattr(self, "bad"):
            y = y * float("nan")
        return y

    monkeypatch.setattr(LayerNorm, "forward", poisoned)
    monkeypatch.setattr(trainer, "probe", probed)
    build = trainer.build_model

    def build_poisoned(cfg: Config, vocab_size: int) -> torch.nn.Module:
        model = build(cfg, vocab_size)
        model.h[1].attn["in"].bad = True
        return model

    monkeypatch.setattr(trainer, "build_model", build_poisoned)
    with pytest.raises(Diverged, match=r"diverged at step 5: loss nan.* h.1.attn.in \(after\)"):
        train(config())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["diverged_at"] == 5
    with pytest.raises(Diverged, match="diverged at step 5 earlier; it is not tried again"):
        train(config())
    assert checkpoints(tmp_path / "run")[0].name == "step_4"
    assert torch.isfinite(load_model(tmp_path / "run").wte.weight).all()
    assert read_rows(tmp_path / "run")[-1]["loss"] is None


def test_the_site_that_is_named_is_that_of_the_step_itself(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running statistics that the step has changed are restored for the search."""
    from gpt.probes.stats import first_nonfinite
    from gpt.training import trainer

    sites: list[str | None] = []

    def watched(*args: Any) -> Any:
        row, record = update(*args)
        sites.append(first_nonfinite({k: v for k, v in record.items() if k[2] != "grad_norm"}))
        return row, record

    monkeypatch.setattr(trainer, "update", watched)
    wild = ["placement=post", "optim.lr=1000", "optim.grad_clip=0", "train.steps=60"]
    with pytest.raises(Diverged) as error:
        train(config("norm=batch_ema", *wild, "train.stats_every=1"))
    assert sites[-1] is not None
    assert f"first in {sites[-1]}" in str(error.value)


def test_the_site_is_looked_for_with_the_dropout_of_the_step_itself(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Picky(Norm):
        axes = ()

        def __init__(self, n_embd: int) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            dropped = (x[0, 0, :5] == 0).tolist()
            return x * math.nan if dropped == [True, False, True, True, False] else x

    monkeypatch.setitem(NORMS, "picky", Picky)
    first = ["placement.attn.in='picky if l == 1 else layer'", "model.dropout=0.5"]
    with pytest.raises(Diverged, match=r"first in h.0.attn.in \(after\)"):
        train(config(*first, "train.steps=300", "train.stats_every=0"))


def first_state(cfg: Config) -> tuple[Run, TrainState, TrainBatches]:
    """A run before its first step, and its batches."""
    run, state = set_up(cfg, Path(), prepare(cfg), Screen(1))
    return run, state, TrainBatches(run.data.train.ids, 4, 1, 32, 0)


def test_the_site_of_a_step_is_found_after_further_steps(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA a few more steps are taken before its loss is read."""

    class Third(BatchNorm):
        step = 0

        def begin_step(self, step: int, steps: int) -> None:
            self.step = step
            if step == 3:
                before.append(self.running_mean.clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (math.nan if self.step == 3 else 1.0)

    before: list[torch.Tensor] = []
    monkeypatch.setitem(NORMS, "third", Third)
    cfg = config("placement.final_norm=third")
    run, state, batches = first_state(cfg)
    for _ in range(5):
        update(cfg, state, state.model, batches, run.device, collecting=False)
    state.step = 3
    assert where_not_finite(cfg, state, batches, run.device) == "first in final_norm (after)"
    assert torch.equal(state.memory["final_norm.running_mean"], before[0])


def test_a_weight_that_is_not_finite_is_named_and_a_large_one_is_not(
    config: Callable[..., Config],
) -> None:
    cfg = config("norm=rbn", "norm.var_weight=0")
    run, state, batches = first_state(cfg)
    gamma = state.model.h[0].mlp["in"].weight  # type: ignore[index, union-attr]

    def site() -> str | None:
        return first_not_finite(cfg, state.model, batches.at(1, run.device), run.device)

    gamma.data[:] = 1e20  # the sum of its squares is infinite in fp32
    assert site() is None
    state.model.h[1].attn["in"].mean_weight = math.inf  # type: ignore[index, union-attr]
    assert site() == "what the norms add to the loss"
    gamma.data[3] = math.nan
    assert site() == "h.0.mlp.in.weight"


def test_a_validation_loss_that_is_not_finite_has_its_site(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Brittle(Norm):
        axes = ()

        def __init__(self, n_embd: int) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if self.training else x * math.nan

    monkeypatch.setitem(NORMS, "brittle", Brittle)
    told = r"diverged at step 0: validation loss nan, first in h.1.mlp.in \(after\). Try a smaller"
    with pytest.raises(Diverged, match=told):
        train(config("placement.mlp.in='brittle if l == 2 else layer'"))


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_not_finite_changes_no_weight(
    fused: bool, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config()
    run, state, batches = first_state(cfg)
    state.optimizer.defaults["fused"] = fused
    if not fused:
        for group in state.optimizer.param_groups:
            group["fused"] = False
    model = state.model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def infinite(x: torch.Tensor, y: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, model(x, y)[1] * float("inf")

    update(cfg, state, infinite, batches, run.device, collecting=False)  # type: ignore[arg-type]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    # On CUDA more steps follow before it is noticed; the cause is searched in these weights.
    update(cfg, state, model, batches, run.device, collecting=False)
    assert torch.equal(model.wte.weight, before["wte.weight"]) == fused
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_an_exploding_learning_rate_exits_17_in_one_line(corpus: Path, tmp_path: Path) -> None:
    result = run_program(
        "data=text", f"data.path={corpus}", "tokenizer=bytes", f"run_dir={tmp_path}/run",
        "norm=dummy", "optim.lr=1e20", "optim.warmup_steps=0", "optim.grad_clip=0",
        "model.n_embd=32", "train.steps=50", "wandb.mode=disabled",
    )  # fmt: skip
    assert result.returncode == 17
    assert "error: diverged at step" in result.stderr
    assert result.stderr.count("\n") == 1
