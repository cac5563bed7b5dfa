"""The causality gate: leaks are found by probing the built model, labelled everywhere, refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gpt.common.errors import ConfigError
from gpt.config import Config
from gpt.norms.base import Norm, norms_of
from gpt.norms.layer import LayerNorm
from gpt.norms.registry import NORMS
from gpt.placement import build_model
from gpt.probes.leak import probe
from gpt.probes.verdict import FUTURE, NEIGHBOURS, UNKNOWN, Sight
from gpt.training.trainer import train
from tests.tools.configs import make_config, mostly_long, read_rows
from tests.tools.programs import run_program, run_pytest


def sight(*overrides: str, steps: int = 200, dtype: str = "float32") -> Sight:
    model = build_model(make_config("data=pydoc", *overrides), 61)
    return probe(model, 61, 32, steps, dtype)


SIGHTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # in training, in evaluation
    "layer": ((), ()),
    "dummy": ((), ()),
    "dyt": ((), ()),
    "batch_ema": ((), ()),
    "anneal": ((), ()),
    "batch": ((FUTURE, NEIGHBOURS), ()),
    "batch_pos": ((NEIGHBOURS,), ()),
    "instance": ((FUTURE,), (FUTURE,)),
    "power": ((FUTURE, NEIGHBOURS), ()),  # in its first 100 steps
    "prepbn": ((FUTURE, NEIGHBOURS), ()),  # once RMSNorm has faded
}
PLACED = list(product(SIGHTS, ["pre", "post", "hybrid"]))


@pytest.mark.parametrize(
    ("norm", "placement"),
    mostly_long(PLACED, *((n, p) for n, p in PLACED if n == "batch" or p == "pre")),
)
def test_what_a_model_lets_tokens_see_is_found(norm: str, placement: str) -> None:
    found = sight(f"norm={norm}", f"placement={placement}")
    assert (found.training, found.evaluation) == SIGHTS[norm]


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "norm=instance",
            "placement.init.o=0",
            "placement.init.fc2=0",
            "placement.final_norm=false",
        ],
        [
            "norm=batch",
            "placement.alpha=1e38",
            "placement.final_norm=false",
        ],  # nothing finite to compare
    ],
)
def test_neither_branches_that_start_at_zero_nor_overflow_hide_a_leak(overrides: list[str]) -> None:
    assert sight(*overrides).training


def first_half(norm: LayerNorm, x: Tensor) -> Tensor:
    """Changing only the last token does not reveal this leak."""
    return x - x[:, : x.shape[1] // 2].mean(1, keepdim=True)


def first_token_of_the_batch(norm: LayerNorm, x: Tensor) -> Tensor:
    return x - x[:1, :1]


def last_token_of_the_batch(norm: LayerNorm, x: Tensor) -> Tensor:
    return x - x[-1:, -1:]


def later_samples(norm: LayerNorm, x: Tensor) -> Tensor:
    return x - x.flip(0).cumsum(0).flip(0)


def earlier_samples(norm: LayerNorm, x: Tensor) -> Tensor:
    return x - x.cumsum(0)


def the_batch_where_gradients_are_on(norm: LayerNorm, x: Tensor) -> Tensor:
    return x - x.mean(0) if torch.is_grad_enabled() else x


def the_batch_by_a_gain_that_starts_at_zero(norm: LayerNorm, x: Tensor) -> Tensor:
    assert norm.bias is not None
    return x + norm.bias * x.mean(0)


@pytest.mark.parametrize(
    ("forward", "training", "evaluation"),
    [
        (first_half, (FUTURE,), (FUTURE,)),
        (first_token_of_the_batch, (NEIGHBOURS,), (NEIGHBOURS,)),
        (last_token_of_the_batch, (FUTURE, NEIGHBOURS), (FUTURE, NEIGHBOURS)),
        (later_samples, (NEIGHBOURS,), (NEIGHBOURS,)),
        (earlier_samples, (NEIGHBOURS,), (NEIGHBOURS,)),
        (the_batch_where_gradients_are_on, (NEIGHBOURS,), ()),
        (the_batch_by_a_gain_that_starts_at_zero, (NEIGHBOURS,), (NEIGHBOURS,)),
    ],
)
def test_a_leak_in_a_corner_is_found(
    forward: Callable[[LayerNorm, Tensor], Tensor],
    training: tuple[str, ...],
    evaluation: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LayerNorm, "forward", forward)
    assert sight() == Sight(training, evaluation)


def test_a_leak_of_the_run_s_precision_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example an attention kernel that masks wrongly in bfloat16 (pytorch#195910)."""

    def forward(norm: LayerNorm, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True) if torch.is_autocast_enabled("cpu") else x

    monkeypatch.setattr(LayerNorm, "forward", forward)
    assert sight() == Sight((), ())
    assert sight(dtype="bfloat16") == Sight((FUTURE,), (FUTURE,))


@pytest.mark.parametrize("norm", ["layer", "rms", "group", "dyt", "batch_ema", "anneal"])
def test_bfloat16_alone_is_no_leak(norm: str) -> None:
    assert sight(f"norm={norm}", dtype="bfloat16") == Sight((), ())


def pairs(norm: LayerNorm, x: Tensor) -> Tensor:
    return x - x.view(-1, 2, *x.shape[1:]).mean(1).repeat_interleave(2, 0)


def test_a_norm_over_pairs_of_samples_can_be_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerNorm, "forward", pairs)
    assert sight() == Sight((NEIGHBOURS,), (NEIGHBOURS,))


def test_a_norm_that_binds_its_buffer_anew_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def counting(self: LayerNorm, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x - x.mean(0) if self.calls > 1 else x

    monkeypatch.setattr(LayerNorm, "forward", counting)
    model = build_model(make_config("data=pydoc"), 61)
    norms = [module for module in model.modules() if isinstance(module, LayerNorm)]
    for norm in norms:
        norm.register_buffer("calls", torch.zeros(()))
    probe(model, 61, 32, 100, "float32")
    assert all(norm.calls == 0 for norm in norms)


def test_a_probe_that_overflows_is_refused_but_no_leak() -> None:
    overflown = sight("norm=dummy", "placement.alpha=1e38", "placement.final_norm=false")
    assert overflown.training == (UNKNOWN,)
    assert not overflown.leaky
    assert overflown.lines()[0].startswith("unknown: in training tokens see something unknown")
    assert sight("norm=batch").leaky


def test_one_leaky_norm_in_one_slot_is_enough() -> None:
    assert sight("placement.mlp.mid='batch if l == 2 else false'").training == (FUTURE, NEIGHBOURS)
    assert sight("norm=batch", "placement=none").training == ()


def test_power_norm_is_causal_without_a_warm_up_on_the_batch() -> None:
    assert sight("norm=power", "norm.warmup_steps=0").training == ()


@pytest.mark.parametrize("norm", ["prepbn", "power", "anneal"])
def test_probing_leaves_no_trace(norm: str) -> None:
    model = build_model(make_config("data=pydoc", f"norm={norm}", "model.dropout=0.5"), 61)
    for module in norms_of(model):
        module.begin_step(1, 1000)
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    x, outputs = torch.randint(61, (4, 32)), []
    for probed in (False, True):
        if probed:
            probe(model, 61, 32, 1000, "float32")
        assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
        torch.manual_seed(0)
        outputs.append(copy.deepcopy(model)(x)[0])
    assert torch.equal(*outputs)
    assert model.training


def test_dropout_is_no_leak() -> None:
    assert sight("model.dropout=0.5").training == ()


def test_a_leak_is_labelled_in_console_rows_and_summary(
    config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config("norm=instance"))
    shown = capsys.readouterr().out
    assert "leaky: in training tokens see later tokens" in shown
    assert (
        "leaky: in evaluation tokens see later tokens; this run's validation loss is not" in shown
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["leaky"] is True
    assert summary["sees_in_training"] == summary["sees_in_evaluation"] == ["later tokens"]
    assert all(row["leaky"] for row in read_rows(tmp_path / "run") if "loss" in row)


@pytest.mark.parametrize("norm", ["batch", "instance", "batch_pos"])
def test_strict_causal_refuses_it(norm: str, config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="strict_causal=true: in training tokens see"):
        train(config(f"norm={norm}", "strict_causal=true"))


def test_strict_causal_lets_a_causal_model_train(config: Callable[..., Config]) -> None:
    assert train(config("norm=layer", "strict_causal=true", "train.steps=1"))["leaky"] is False


OWN = """
from torch import nn
from gpt.norms import Norm, register

@register("mine")
class Mine(Norm):
    axes = ("C",)   # a lie: it takes the batch's mean
    invariances = ("shift",)

    def __init__(self, n_embd: int, *, strength: float = 1.0) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, x):
        return x - self.strength * x.mean((0, 1))
"""


def test_a_norm_of_one_s_own_runs_from_the_command_line_and_its_leak_is_found(
    corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "my_norms.py").write_text(OWN)
    args = ["data=text", f"data.path={corpus}", "tokenizer=bytes", "train.steps=1", "device=cpu",
            "train.eval_tokens=256", "model.n_layer=1", "wandb.mode=disabled"]  # fmt: skip
    own = ["norm=module", "norm.module=my_norms.py", "norm.name=mine"]
    result = run_program(*args, *own, "+norm.strength=0.5", "run_dir=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "in training tokens see later tokens and other samples" in result.stdout
    assert "in evaluation tokens see later tokens and other samples" in result.stdout

    sample = run_program("run_dir=run", "max_new_tokens=3", script="sample", cwd=tmp_path)
    assert sample.returncode == 78  # a run directory's configuration runs no code
    assert "norm_module=my_norms.py (train.py: norm.module=my_norms.py)" in sample.stderr
    sample = run_program("run_dir=run", "max_new_tokens=3", "norm_module=my_norms.py",
                         script="sample", cwd=tmp_path)  # fmt: skip
    assert sample.returncode == 0, sample.stderr

    slot = ["norm.module=my_norms.py", "placement.attn.out=mine", "run_dir=slot"]
    assert run_program(*args, *slot, cwd=tmp_path).returncode == 0
    missing = run_program(*args, "norm.module=her_norms.py", cwd=tmp_path)
    assert missing.returncode == 66
    assert missing.stderr == "error: norm module her_norms.py: no such file\n"


def test_a_norm_of_one_s_own_draws_its_initial_weights_from_the_run_s_seed(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Random(Norm):
        axes = ()

        def __init__(self, n_embd: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(n_embd))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    monkeypatch.setitem(NORMS, "random", Random)

    def weights(seed: int) -> list[torch.Tensor]:
        torch.randn(1)  # other code may have drawn numbers
        model = build_model(config("placement.attn.out=random", f"seed={seed}"), 32)
        return [block.attn["out"].weight for block in model.h]

    first, again, other = weights(1), weights(1), weights(2)
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_a_norm_of_one_s_own_that_was_edited_is_another(corpus: Path, tmp_path: Path) -> None:
    """A finished run does not count as one with the new code; a stopped run does not resume."""
    (tmp_path / "my_norms.py").write_text(OWN)
    args = ["data=text", f"data.path={corpus}", "tokenizer=bytes", "train.steps=1", "device=cpu",
            "train.eval_tokens=256", "model.n_layer=1", "wandb.mode=disabled", "run_dir=run",
            "norm=module", "norm.module=my_norms.py", "norm.name=mine"]  # fmt: skip
    assert run_program(*args, cwd=tmp_path).returncode == 0
    assert "has already finished" in run_program(*args, cwd=tmp_path).stdout
    (tmp_path / "my_norms.py").write_text(OWN.replace("(0, 1)", "1, keepdim=True"))
    finished = run_program(*args, cwd=tmp_path)
    (tmp_path / "run" / "DONE").unlink()
    stopped = run_program(*args, cwd=tmp_path)
    for result, words in (
        (finished, "has finished with another norm.module"),
        (stopped, "norm_sha256 was"),
    ):
        assert result.returncode == 65
        assert words in result.stderr


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "def forward(self, x): return x.nrm()",
            "line 14, AttributeError: 'Tensor' object has no attribute",
        ),
        (
            "def forward(self, x): return None",
            "its forward returned NoneType; expected a tensor of",
        ),
        (
            "def forward(self, x): return x[:1]",
            "its forward returned (1, 2, 8); expected a tensor of",
        ),
        ("def forward(self, x): return x.view(2, *x.shape[1:])", "norm.module: with 4 samples of"),
        (
            "def forward(self, x): self.register_buffer('late', x.mean()); return x",
            "h.0.attn.in.late: the buffer appeared later",
        ),
    ],
)
def test_a_broken_norm_of_one_s_own_is_one_line(code: str, message: str, tmp_path: Path) -> None:
    own = OWN[: OWN.index("    def forward")] + f"    {code}\n"
    (tmp_path / "broken.py").write_text(own)
    args = ["norm=module", "norm.module=broken.py", "norm.name=mine", "model.n_embd=8",
            "model.n_head=1", "tokenizer=bytes", "run_dir=run"]  # fmt: skip
    result = run_program(*args, cwd=tmp_path)
    assert result.returncode == 78
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()  # it never began


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (OWN, "mein", "registers mine"),
        ("", "mine", "registers no norm"),
        ("raise SystemExit(3)", "mine", "SystemExit: 3"),
        ("def", "mine", "SyntaxError"),
    ],
)
def test_a_file_that_does_not_register_the_norm_is_one_line(
    code: str, name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(code)
    args = ["norm=module", "norm.module=own.py", f"norm.name={name}", "tokenizer=bytes"]
    result = run_program(*args, cwd=tmp_path)
    assert result.returncode == 78
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_pytest_s_options_are_refused_in_one_line() -> None:
    for option in (["--norm", "layr"], ["--norm-module", "nowhere.py"]):
        result = run_pytest(*option)
        assert result.returncode == 4
        assert "INTERNALERROR" not in result.stderr + result.stdout


def test_the_suite_runs_for_one_s_own_norm_and_finds_its_lie(tmp_path: Path) -> None:
    (tmp_path / "my_norms.py").write_text(OWN)
    own = ["--norm-module", str(tmp_path / "my_norms.py"), "--norm", "mine"]
    result = run_pytest(*own, "tests/test_conformance.py")
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 2, result.stdout
    assert "test_it_sees_along_its_declared_axes_only[mine]" in failed[0]
    assert "test_one_token_of_one_sample_can_be_evaluated[mine]" in failed[1]
