"""The benchmarks of training steps run, and say in one line what they lack."""

from __future__ import annotations

from pathlib import Path

from tests.tools.configs import overrides
from tests.tools.programs import run_program

NANOGPT = """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.config = config

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)

    def forward(self, idx, targets):
        logits = self.wte(idx) @ self.wte.weight.T
        loss = nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
        return logits, loss
"""


def test_steps_are_timed_beside_another_model_s(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(NANOGPT)
    tiny = overrides("data=text", f"data.path={corpus}", "train.steps=1", "train.grad_accum=2")
    result = run_program(str(tmp_path), *tiny, script="bench")
    assert result.returncode == 0, result.stderr
    assert "times as many tokens a second on cpu, 1 threads" in result.stdout


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    result = run_program(str(tmp_path), script="bench")
    assert result.returncode == 66
    assert result.stderr == f"error: {tmp_path}/model.py: no such file; clone nanoGPT there\n"


def test_the_cost_of_statistics_is_measured_in_runs_of_any_length(corpus: Path) -> None:
    short = ["train.steps=4", "optim.warmup_steps=4"]
    tiny = overrides("data=text", f"data.path={corpus}", *short)
    result = run_program(*tiny, script="bench_stats")
    assert result.returncode == 0, result.stderr
    assert "of the training at stats_every=3 on cpu" in result.stdout
