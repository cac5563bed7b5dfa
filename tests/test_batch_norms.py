"""The BatchNorm laboratory: statistics once a step, its discrepancy, folding; norms that change."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from gpt.checkpoint import checkpoints, load_model
from gpt.config import Config
from gpt.errors import ConfigError
from gpt.fold import Affine, fold
from gpt.generate import generate
from gpt.norms.anneal import AnnealedLayerNorm
from gpt.norms.batch import BatchNorm
from gpt.norms.power import PowerNorm
from gpt.norms.prepbn import ProgressiveRepBatchNorm
from gpt.norms.rbn import RegularisedBatchNorm
from gpt.norms.registry import begin_step, build_norm, commit, defer, norms_of, penalties
from gpt.placement import build_model
from gpt.trainer import train
from tests.conftest import make_config, read_rows
from tests.programs import run_program

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
    parts.commit()
    torch.testing.assert_close(parts.running_mean, whole.running_mean)
    torch.testing.assert_close(parts.running_var, whole.running_var)
    parts.commit()  # nothing seen since: nothing happens
    torch.testing.assert_close(parts.running_var, whole.running_var)


def test_accumulation_updates_running_statistics_once_a_step(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    """torch's own would have moved them grad_accum times (pytorch#46516)."""
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
    tid_mean, tid_std = norm.discrepancy(x)
    assert tid_mean.item() == pytest.approx((0 / 1 + 1 / 2) / 2)
    assert tid_std.item() == pytest.approx((abs(2 / 1 - 1) + abs(1 / 2 - 1)) / 2)
    power = PowerNorm(2, eps=1e-12).double()
    power.running_var.copy_(torch.tensor([18.0, 20.0]))  # the mean squares are 2 and 5
    assert [t.item() for t in power.discrepancy(x)] == pytest.approx([0, (3 - 1 + 2 - 1) / 2])


def test_statistics_hold_the_discrepancy_of_every_site(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    train(config("norm=batch"))
    sites = read_rows(tmp_path / "run", "stats")[-1]["sites"]
    assert all(entry["tid_mean"] > 0 and entry["tid_std"] > 0 for entry in sites.values())
    assert len(sites) == 5
    evaluations = [r for r in read_rows(tmp_path / "run") if "val_loss" in r]
    assert all(r["val_loss_batch_stats"] != r["val_loss"] for r in evaluations)


def test_a_batch_of_one_trains_and_says_what_its_statistics_are(
    config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    assert math.isfinite(train(config("norm=batch", "train.batch_size=1"))["val_loss"])
    assert "the statistics are those of one sample" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("norm", "also", "message"),
    [
        ("batch", "model.block_size=1", "train.batch_size=1 and model.block_size=1 give one"),
        ("layer", "placement.head=batch_pos", "norm=batch_pos: train.batch_size=1 gives one"),
    ],
)
def test_a_batch_of_one_value_is_refused(
    norm: str, also: str, message: str, config: Callable[..., Config]
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config(f"norm={norm}", "train.batch_size=1", also))


@pytest.mark.parametrize("norm", BATCH_NORMS)
@pytest.mark.parametrize("placement", ["pre", "peri", "subln", "hybrid", "parallel", "lns", "post"])
def test_folded_norms_give_the_same_logits(norm: str, placement: str) -> None:
    model = build_model(make_config("data=pydoc", f"norm={norm}", f"placement={placement}"), 61)
    generator = torch.Generator().manual_seed(0)
    for module in norms_of(model):
        for parameter in module.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        begin_step(model, 100, 100)  # prepbn has no RMSNorm left
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
    assert result.stderr == "norms: 4 folded into Linears, 1 left as a scale and a shift, 0 kept\n"


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
    norm(3 * x)  # the second of two
    torch.testing.assert_close(norm.running_std, 2 * std)
    norm(2 * x)  # the third of three
    torch.testing.assert_close(norm.running_std, 2 * std)
    std = norm.running_std.clone()
    norm.begin_step(9, 11)  # 80% are done
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(norm(2 * x), 2 * centred / std)  # σ̄ stays: it is linear now
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
            defer(norm, pieces)
            for micro, gradient in zip(x.chunk(pieces), dy.chunk(pieces), strict=True):
                norm(micro.clone().requires_grad_()).backward(gradient)
            commit(norm)
        for (name, a), b in zip(whole.named_buffers(), parts.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)
        assert any(b.dim() and b.abs().sum() > 0 for b in whole.buffers()) or whole.running_std > 0


def test_rbn_s_penalty_is_minimised_and_not_logged(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    norm, x = RegularisedBatchNorm(2, mean_weight=2.0, var_weight=3.0), torch.zeros(1, 2, 2)
    x[0, :, 0] = torch.tensor([1.0, 3.0])  # means 2, 0; biased variances 1, 0
    norm.running_mean[0] = 0.5  # the others 0; running variances 1
    norm(x)
    assert float(penalties(norm)) == pytest.approx(2 * (1.5**2 + 0) + 3 * (0 + 1))
    for weight in (0, 10):
        train(config("norm=rbn", f"norm.mean_weight={weight}", f"norm.var_weight={weight}",
                     f"run_dir={tmp_path}/{weight}"))  # fmt: skip
    losses = [[r["loss"] for r in read_rows(tmp_path / str(w)) if "loss" in r] for w in (0, 10)]
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


def test_power_norm_s_warm_up_ends_after_its_steps() -> None:
    norm, x = PowerNorm(4, warmup_steps=2, eps=1e-12), torch.randn(2, 3, 4)
    norm.deferred = True
    for step, psi in ((2, x.square().mean((0, 1))), (3, torch.ones(4))):
        norm.begin_step(step, 10)
        torch.testing.assert_close(norm(x), x / psi.sqrt())


def test_power_norm_after_its_warm_up_is_the_paper_s_algorithm() -> None:
    """Forward by the steps' running ψ, backward by Γ, Λ and ν, written out for three steps."""
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
        norm.commit()
        with torch.no_grad():
            x_hat = x / psi2.sqrt()
            torch.testing.assert_close(y, x_hat)  # γ = 1, β = 0
            torch.testing.assert_close(x.grad, (dy - nu * x_hat) / psi2.sqrt())
            gamma, lam = x_hat.square().mean((0, 1)), (dy * x_hat).mean((0, 1))
            nu = nu * (1 - 0.1 * gamma) + 0.1 * lam
            psi2 = 0.9 * psi2 + 0.1 * x.square().mean((0, 1))
    torch.testing.assert_close(norm.running_var, psi2)
    torch.testing.assert_close(norm.nu, nu)


# --- surgery ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("source") / "run"
    train(make_config("data=text", f"data.path={corpus}", "norm=layer", f"run_dir={run_dir}",
                      "train.steps=40", "train.eval_every=40"))  # fmt: skip
    return run_dir


def transplanted(source: Path, corpus: Path, run_dir: Path, *args: str):  # type: ignore[no-untyped-def]
    from tests.conftest import overrides

    return run_program(*overrides("data=text", f"data.path={corpus}", f"run_dir={run_dir}", *args,
                                  f"init.from={source}"))  # fmt: skip


@pytest.mark.parametrize(
    ("norm", "says"), [("rms", "without its bias"), ("batch", "new running_mean, running_var")]
)
def test_a_trained_model_goes_on_with_another_norm(
    norm: str, says: str, source: Path, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    result = transplanted(source, corpus, run_dir, f"init.swap_norm={norm}")
    assert result.returncode == 0, result.stderr
    assert f"starting from {source}" in result.stdout
    assert says in result.stdout
    first = read_rows(run_dir)[0]
    before = read_rows(source)
    assert before[-1]["val_loss"] < before[0]["val_loss"] - 0.5
    if norm == "rms":  # near LayerNorm on such a stream; batch must learn its statistics first
        assert first["val_loss"] < before[0]["val_loss"] - 0.5
    names = {type(m).__name__ for m in norms_of(load_model(run_dir))}
    assert names == {{"rms": "RMSNorm", "batch": "BatchNorm"}[norm]}


def test_going_on_with_the_same_norm_starts_where_the_run_ended(
    source: Path, corpus: Path, tmp_path: Path
) -> None:
    assert transplanted(source, corpus, tmp_path / "run").returncode == 0
    assert read_rows(tmp_path / "run")[0]["val_loss"] == read_rows(source)[-1]["val_loss"]


def test_what_is_not_swapped_stays_as_it_was(corpus: Path, tmp_path: Path) -> None:
    """The head's running statistics; and of a norm that begins as another its γ."""
    source, options = tmp_path / "source", ["norm=rms", "placement.head=batch"]
    cfg = make_config("data=text", f"data.path={corpus}", *options, f"run_dir={source}",
                      "train.steps=40", "train.eval_every=40", "optim.lr=1e-2")  # fmt: skip
    train(cfg)
    for norm in ("rms", "prepbn"):
        swap = [f"init.swap_norm={norm}", "placement.head=batch", "train.steps=1"]
        result = transplanted(source, corpus, tmp_path / norm, *swap)
        assert result.returncode == 0, result.stderr
        began = read_rows(tmp_path / norm)[0]["val_loss"]
        assert began == pytest.approx(read_rows(source)[-1]["val_loss"], abs=1e-6)


def test_a_damaged_checkpoint_of_the_source_is_passed_over(
    source: Path, corpus: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(source, tmp_path / "source"))
    last, before = checkpoints(moved)[:2]
    (last / "manifest.json").unlink()
    assert transplanted(moved, corpus, tmp_path / "run").returncode == 0
    taken = json.loads((tmp_path / "run" / "summary.json").read_text())["init_sha256"]
    assert taken == json.loads((before / "manifest.json").read_text())["model.safetensors"]


def test_a_source_that_has_other_weights_now_is_told(
    source: Path, corpus: Path, tmp_path: Path
) -> None:
    """A finished run is not taken for one that starts from them; without its source it stands."""
    moved, run_dir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(source, moved)
    assert transplanted(moved, corpus, run_dir).returncode == 0
    assert "is finished already" in transplanted(moved, corpus, run_dir).stdout
    taken = json.loads((run_dir / "summary.json").read_text())["init_sha256"]
    shutil.rmtree(moved)
    assert "is finished already" in transplanted(moved, corpus, run_dir).stdout
    (run_dir / "DONE").unlink()
    assert "resuming" in transplanted(moved, corpus, run_dir).stdout
    assert json.loads((run_dir / "summary.json").read_text())["init_sha256"] == taken
    train(make_config("data=text", f"data.path={corpus}", f"run_dir={moved}", "seed=2"))
    finished = transplanted(moved, corpus, run_dir)
    (run_dir / "DONE").unlink()
    stopped = transplanted(moved, corpus, run_dir)
    for result, words in (
        (finished, "is finished, from other weights"),
        (stopped, "init_sha256 was"),
    ):
        assert result.returncode == 65
        assert words in result.stderr


def test_norms_are_taken_away_by_a_schedule(source: Path, corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = ["init.swap_norm=anneal", "norm.end=0.9", "train.steps=20"]
    result = transplanted(source, corpus, run_dir, *options)
    assert result.returncode == 0, result.stderr
    rows = read_rows(run_dir)
    assert rows[0]["val_loss"] == pytest.approx(read_rows(source)[-1]["val_loss"], rel=1e-5)
    model = load_model(run_dir)
    assert all(norm.end == 0.9 for norm in norms_of(model))
    assert all(norm.fade == 1 for norm in norms_of(model))
    assert rows[-1]["val_loss"] < read_rows(source)[0]["val_loss"]
    from gpt.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(run_dir / "tokenizer.json")
    assert "".join(generate(model, tokenizer, "the", max_new_tokens=5))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["norm=rms"],
            "it has norm.name=layer; say so here too, or instead of it init.swap_norm=rms",
        ),
        (["model.n_layer=3"], "it has model.n_layer=2; say so here too"),
        (["placement=post"], "it has placement.name=pre; say so here too"),
        (["placement.attn.q=true"], "it has placement.attn.q=False; say so here too"),
        (["tokenizer=bpe"], "its tokens are others"),
        (["init.swap_norm=rmz"], "init.swap_norm=rmz: expected one of"),
        (["init.swap_norm=rms", "norm=rms"], "leave out norm=… beside it"),
        (["init.swap_norm=rms", "norm.epz=1e-3"], "did you mean 'eps'"),
    ],
)
def test_what_does_not_fit_is_refused(
    args: list[str], message: str, source: Path, corpus: Path, tmp_path: Path
) -> None:
    result = transplanted(source, corpus, tmp_path / "run", *args)
    assert result.returncode == 78, result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_short_samples_leave_the_statistics_of_later_positions_as_they_were() -> None:
    norm = build_norm("batch_pos", 3, block_size=4)
    for micro_batches in (1, 2) * 100:
        norm.deferred = True
        for _ in range(micro_batches):
            norm(torch.randn(2, 1, 3))
        norm.commit()
    torch.testing.assert_close(norm.running_var[1:], torch.ones(3, 3))
    assert torch.equal(norm.running_mean[1:], torch.zeros(3, 3))
    assert not torch.equal(norm.running_mean[0], torch.zeros(3))
