"""init.from: training goes on from a trained model, whose norms may be swapped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gpt.norms.base import norms_of
from gpt.sampling.generate import generate
from gpt.training.checkpoint import checkpoints, load_model
from gpt.training.trainer import train
from tests.tools.configs import make_config, overrides, read_rows
from tests.tools.programs import run_program


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("source") / "run"
    train(make_config("data=text", f"data.path={corpus}", "norm=layer", f"run_dir={run_dir}",
                      "train.steps=40", "train.eval_every=40"))  # fmt: skip
    return run_dir


def transplanted(source: Path, corpus: Path, run_dir: Path, *args: str):  # type: ignore[no-untyped-def]
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
    """The final norm's running statistics, and γ if the new norm begins as the old one."""
    source, options = tmp_path / "source", ["norm=rms", "placement.final_norm=batch"]
    cfg = make_config("data=text", f"data.path={corpus}", *options, f"run_dir={source}",
                      "train.steps=40", "train.eval_every=40", "optim.lr=1e-2")  # fmt: skip
    train(cfg)
    for norm in ("rms", "prepbn"):
        swap = [f"init.swap_norm={norm}", "placement.final_norm=batch", "train.steps=1"]
        result = transplanted(source, corpus, tmp_path / norm, *swap)
        assert result.returncode == 0, result.stderr
        began = read_rows(tmp_path / norm)[0]["val_loss"]
        assert began == pytest.approx(read_rows(source)[-1]["val_loss"], abs=1e-6)


ZERO = """
import torch
from torch import nn
from gpt.norms import Norm, register

@register("zero_centred")
class ZeroCentred(Norm):
    axes = ("C",)
    invariances = ("scale",)

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_embd))  # its γ is one more

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, 1e-5)
"""


def test_gamma_comes_along_by_its_distance_from_where_the_norm_starts_it(
    corpus: Path, tmp_path: Path
) -> None:
    """RMSNorm with γ parametrised as 1 + weight is the same model."""
    (tmp_path / "own.py").write_text(ZERO)
    source = tmp_path / "source"
    train(make_config("data=text", f"data.path={corpus}", "norm=rms", f"run_dir={source}",
                      "train.steps=40", "train.eval_every=40", "optim.lr=1e-2"))  # fmt: skip
    gamma = load_model(source).final_norm.weight
    assert (gamma - 1).abs().max() > 0.05  # type: ignore[operator, union-attr]
    own = [f"norm.module={tmp_path}/own.py", "norm.name=zero_centred"]
    result = transplanted(source, corpus, tmp_path / "run", "init.swap_norm=module", *own)
    assert result.returncode == 0, result.stderr
    began = read_rows(tmp_path / "run")[0]["val_loss"]
    assert began == pytest.approx(read_rows(source)[-1]["val_loss"], abs=1e-5)


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
    """A finished run does not count as one from the new weights. It needs no source to count."""
    moved, run_dir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(source, moved)
    assert transplanted(moved, corpus, run_dir).returncode == 0
    assert "has already finished" in transplanted(moved, corpus, run_dir).stdout
    taken = json.loads((run_dir / "summary.json").read_text())["init_sha256"]
    shutil.rmtree(moved)
    assert "has already finished" in transplanted(moved, corpus, run_dir).stdout
    (run_dir / "DONE").unlink()
    assert "resuming" in transplanted(moved, corpus, run_dir).stdout
    assert json.loads((run_dir / "summary.json").read_text())["init_sha256"] == taken
    train(make_config("data=text", f"data.path={corpus}", f"run_dir={moved}", "seed=2"))
    finished = transplanted(moved, corpus, run_dir)
    (run_dir / "DONE").unlink()
    stopped = transplanted(moved, corpus, run_dir)
    for result, words in (
        (finished, "has finished from other weights"),
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
    from gpt.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(run_dir / "tokenizer.json")
    assert generate(model, tokenizer, "the", max_new_tokens=5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["norm=rms"],
            "it has norm.name=layer; set that here too, or init.swap_norm=rms instead",
        ),
        (["model.n_layer=3"], "it has model.n_layer=2; set that here too"),
        (["model.n_layer=3", "model.n_head=1"], "model.n_layer=2 model.n_head=2; set that here"),
        (["placement=post"], "it has placement.name=pre; set that here too"),
        (["placement.attn.q=true"], "it has placement.attn.q=False; set that here too"),
        (["tokenizer=bpe"], "it uses a different tokenizer"),
        (["init.swap_norm=rmz"], "init.swap_norm=rmz: expected anneal |"),
        (
            ["init.swap_norm=mine", "norm.module=own.py"],
            "expected init.swap_norm=module norm.module=own.py norm.name=mine",
        ),
        (["init.swap_norm=rms", "norm=rms"], "leave out norm=…"),
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
