"""Whole runs: what the summary holds, what a step does, the edges."""

from __future__ import annotations

import json
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path
from shutil import which
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpt.common.device import peak_memory, reset_peak_memory, resolve_device
from gpt.common.errors import DataError, MissingInput
from gpt.config import Config
from gpt.data.batches import TrainBatches, ValBatches
from gpt.norms.power import PowerNorm
from gpt.placement import build_model
from gpt.training import trainer
from gpt.training.checkpoint import TrainState
from gpt.training.evaluation import evaluate
from gpt.training.optimizer import make_optimizer
from gpt.training.step import Row, update
from gpt.training.trainer import train
from tests.tools.configs import curve, make_config, mostly_long, read_rows


def test_runs_that_differ_in_the_norm_see_the_same_batches_and_start_alike(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    seen: dict[str, list[int]] = {}
    original = TrainBatches.at
    for norm in ("layer", "dummy", "batch"):
        sums = seen.setdefault(norm, [])

        def spy(self, step, device, sums=sums):  # type: ignore[no-untyped-def]
            for x, y in original(self, step, device):
                sums.append(int(x.sum()))
                yield x, y

        monkeypatch.setattr(TrainBatches, "at", spy)
        train(config(f"norm={norm}", "model.dropout=0.1", f"run_dir={tmp_path}/{norm}"))
    assert seen["layer"] == seen["dummy"] == seen["batch"]
    assert len(set(seen["layer"])) == 6


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_the_summary_holds_what_a_comparison_needs(
    norm: str, config: Callable[..., Config], tmp_path: Path
) -> None:
    summary = train(config(f"norm={norm}"))
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {
        "val_loss", "val_bpb", "train_loss", "norm", "placement", "batch_size", "params",
        "tokens_per_s", "leaky", "seed", "corpus_sha256",
    } <= set(summary)  # fmt: skip
    assert summary["leaky"] is (norm == "batch")
    assert ("val_loss_batch_stats" in summary) is (norm == "batch")
    rows = read_rows(tmp_path / "run")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert summary["train_loss"] == pytest.approx(sum(losses) / 6)
    assert summary["val_loss"] == [r["val_loss"] for r in rows if "val_loss" in r][-1]
    assert summary["tokens"] == 6 * 4 * 32
    assert summary["tokens_per_s"] == median(r["tokens_per_s"] for r in rows if "loss" in r)


def test_the_loss_by_the_batch_s_statistics_is_that_of_full_batches() -> None:
    """The last batch is shorter, so its statistics are not comparable."""
    model = build_model(make_config("norm=batch", "model.block_size=8"), 64)
    ids = np.random.default_rng(0).integers(64, size=18 * 8 + 1)

    def evaluated(windows: int) -> dict[str, float]:
        batches = ValBatches(ids[: windows * 8 + 1], 4, 8, max_tokens=windows * 8)
        return evaluate(model, batches, torch.ones(64).long(), torch.device("cpu"), "float32")

    assert "val_loss_batch_stats" not in evaluated(3)
    with_rest, without = evaluated(18), evaluated(16)
    assert with_rest["val_loss_batch_stats"] == without["val_loss_batch_stats"]
    assert with_rest["val_loss"] != without["val_loss"]


def test_bits_per_byte_count_the_bytes_of_the_targets() -> None:
    """Two windows over tokens 0 1 1 … 1: every target is token 1, which has 3 bytes."""
    model = build_model(make_config("data=pydoc", "model.block_size=8"), 64)
    batches = ValBatches(np.array([0] + 16 * [1]), 4, 8, max_tokens=16)
    bytes_of = torch.tensor([1000, 3, *[7] * 62])
    result = evaluate(model, batches, bytes_of, torch.device("cpu"), "float32")
    assert result["val_bpb"] == pytest.approx(result["val_loss"] / math.log(2) / 3, rel=1e-6)


def test_the_model_is_in_training_mode_in_every_step(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This includes steps that follow an evaluation."""
    modes: list[bool] = []
    original = trainer.update

    def spy(cfg, state, *args):  # type: ignore[no-untyped-def]
        modes.append(all(module.training for module in state.model.modules()))
        return original(cfg, state, *args)

    monkeypatch.setattr(trainer, "update", spy)
    train(config())
    assert modes == [True] * 6


class Same:
    """Batches that are the same in every micro-batch of every step."""

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.ids = torch.randint(61, (4, 33), generator=torch.Generator().manual_seed(0))

    def at(self, step: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        return [(self.ids[:, :-1], self.ids[:, 1:])] * self.micro_batches


def one_step(*overrides: str) -> tuple[TrainState, Row]:
    """The first step of a model with a vocabulary of 61 tokens."""
    cfg = make_config("data=pydoc", *overrides)
    model = build_model(cfg, 61)
    state = TrainState(0, model, make_optimizer(model, cfg.optim), {}, dict(model.named_buffers()))
    batches: Any = Same(cfg.train.grad_accum)
    row, _ = update(cfg, state, model, batches, torch.device("cpu"), collecting=False)
    return state, row


@pytest.mark.parametrize("norm", ["layer", "rbn"])
def test_equal_micro_batches_have_the_gradient_of_one(norm: str) -> None:
    """This includes the gradient of a norm's extra loss."""
    heavy = ["norm.mean_weight=10", "norm.var_weight=10"] if norm == "rbn" else []
    one, two = (
        one_step(f"norm={norm}", *heavy, f"train.grad_accum={n}")[1].grad_norm.item()
        for n in (1, 2)
    )
    assert two == pytest.approx(one, rel=1e-5)


def test_the_gradient_is_clipped_to_the_limit_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped: list[float] = []

    def step(optimizer: torch.optim.AdamW) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        clipped.append(torch.nn.utils.get_total_norm(grads).item())

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for limit in (0.1, 1e9):
        _, row = one_step(f"optim.grad_clip={limit}")
        assert clipped.pop() == pytest.approx(min(limit, row.grad_norm.item()), rel=1e-5)


def test_norms_are_told_each_step_as_it_begins(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(PowerNorm, "begin_step", lambda norm, *step: told.append(step))
    train(config("norm=power", "placement=none", "placement.final_norm=true"))
    in_training = told[-6:]  # earlier calls are the probe's, for the first and last step
    assert in_training == [(step, 6) for step in range(1, 7)]


def test_bits_per_byte_of_bytes_are_nats_over_ln2(config: Callable[..., Config]) -> None:
    summary = train(config())
    assert summary["val_bpb"] == pytest.approx(summary["val_loss"] / math.log(2), rel=1e-6)


def test_bits_per_byte_of_bpe_count_the_bytes_of_the_tokens(config: Callable[..., Config]) -> None:
    summary = train(config("tokenizer=bpe"))
    assert summary["val_bpb"] < summary["val_loss"] / math.log(2) / 1.5


def test_the_logged_loss_is_the_mean_over_micro_batches(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    whole = config("train.batch_size=8", f"run_dir={tmp_path}/whole")
    parts = config("train.batch_size=2", "train.grad_accum=4", f"run_dir={tmp_path}/parts")
    train(whole), train(parts)
    for a, b in zip(read_rows(tmp_path / "whole"), read_rows(tmp_path / "parts"), strict=True):
        for key in a.keys() & {"loss", "grad_norm", "val_loss"}:
            assert a[key] == pytest.approx(b[key], rel=2e-4)


@pytest.mark.skipif(
    not (which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="torch.compile needs g++ and Python.h",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("backend", mostly_long(["inductor", "aot_eager"], "aot_eager"))
def test_a_model_that_is_compiled_trains_like_one_that_is_not(
    backend: str, config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout must be the same: steps with statistics are not compiled."""
    compile_ = torch.compile

    def whole_graph(model: nn.Module, options: dict[str, Any]) -> Any:
        chosen = {"options": options} if backend == "inductor" else {"backend": backend}
        return compile_(model, fullgraph=True, **chosen)

    monkeypatch.setattr(torch, "compile", whole_graph)
    options = ["model.dropout=0.2", "model.n_layer=1"]
    train(config(*options, f"run_dir={tmp_path}/eager"))
    train(config(*options, "compile=true", f"run_dir={tmp_path}/compiled"))
    a, b = (
        [row["loss"] for row in read_rows(tmp_path / name) if "loss" in row]
        for name in ("eager", "compiled")
    )
    assert a == pytest.approx(b, rel=1e-5)


def test_bfloat16_trains_close_to_float32(config: Callable[..., Config], tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        train(config(f"dtype={dtype}", "norm=rms", f"run_dir={tmp_path}/{dtype}"))
    a, b = (
        [row["loss"] for row in read_rows(tmp_path / name) if "loss" in row]
        for name in ("float32", "bfloat16")
    )
    assert a != b
    assert a == pytest.approx(b, rel=0.01)


def test_gradients_are_clipped_unless_the_limit_is_zero(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    curves = []
    for limit in ("0", "1e9", "0.1"):
        train(config(f"optim.grad_clip={limit}", f"run_dir={tmp_path}/{limit}"))
        curves.append(curve(tmp_path / limit))
    assert curves[0] == curves[1] != curves[2]


def test_a_run_says_what_it_is_and_whether_its_rate_is_ever_reached(
    config: Callable[..., Config], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    never = "the run ends before optim.lr is reached"
    train(config("norm=rms"))
    out = capsys.readouterr().out
    assert "norm=rms placement=pre on cpu: 34,528 parameters, " in out
    assert " bytes of text to train on as " in out
    assert never not in out
    train(config("optim.warmup_steps=6", "train.steps=6", f"run_dir={tmp_path}/just"))
    out = capsys.readouterr().out
    assert "norm=layer placement=pre on cpu" in out
    assert never not in out
    train(config("placement.attn.out=rms", f"run_dir={tmp_path}/slot"))
    assert "norm=layer (in some slots rms) placement=pre on cpu" in capsys.readouterr().out
    train(config("optim.warmup_steps=7", "train.steps=6", f"run_dir={tmp_path}/short"))
    assert f"optim.warmup_steps=7: {never}" in capsys.readouterr().out


def test_a_run_whose_validation_losses_were_removed_is_one_line(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    train(config())
    (tmp_path / "run" / "DONE").unlink()
    path = tmp_path / "run" / "metrics.jsonl"
    rows = [line for line in path.read_text().splitlines(True) if "val_loss" not in line]
    path.write_text("".join(rows))
    with pytest.raises(DataError, match=r"metrics.jsonl: changed or shortened since"):
        train(config())


def test_the_validation_loss_does_not_depend_on_dropout_or_statistics_of_the_batch(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    """Evaluation uses evaluation mode and fixed windows: at step 0 only the model matters."""
    at_start = set()
    for i, extra in enumerate(["train.batch_size=1", "train.batch_size=7", "model.dropout=0.5"]):
        train(config(extra, f"run_dir={tmp_path}/{i}", "train.steps=1"))
        at_start.add(round(read_rows(tmp_path / str(i))[0]["val_loss"], 5))
    assert len(at_start) == 1


def test_each_step_and_each_evaluation_has_a_row(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    train(config())
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [0, 1, 2, 3, 3, 4, 5, 6, 6]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_a_cuda_device_with_a_number_becomes_torch_s_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert resolve_device("auto") == torch.device("cuda")
    assert current == []
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]
    with pytest.raises(MissingInput, match="device=cuda:2: not on this machine; it has cuda, "):
        resolve_device("cuda:2")


def test_the_peak_memory_is_the_run_s_own() -> None:
    """A sweep's cells share a process: a small cell must not report a large one's peak."""
    device = torch.device("cpu")
    large = torch.ones(100_000_000)
    assert peak_memory(device) > 400_000_000
    before = peak_memory(device)
    del large
    reset_peak_memory(device)
    assert peak_memory(device) < before - 300_000_000
