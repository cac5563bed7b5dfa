"""Compares the speed of a training step with nanoGPT's: python scripts/bench.py NANOGPT [OVERRIDES]

NANOGPT is a clone of github.com/karpathy/nanoGPT. Its model, with biases, and its optimizer take
the steps of its train.py. Steps of the default run, changed by OVERRIDES, alternate with these (A B
A B …) on the same batch. The script prints both medians and their ratio. On CUDA nanoGPT then uses
our deterministic kernels and not its TF32. No run is written.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from bench_stats import prepared
from torch import Tensor, nn

from gpt.cli.errors import run
from gpt.common.device import autocast
from gpt.common.errors import MissingInput
from gpt.data.batches import TrainBatches
from gpt.training.step import update
from gpt.training.trainer import Run

STEPS = 20
Step = Callable[[], Tensor]  # takes a step and returns its loss


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("nanogpt", type=Path, help="the folder with nanoGPT's model.py")
    parser.add_argument("override", nargs="*", help="an override, as for scripts/train.py")
    arguments = parser.parse_args()
    if not (arguments.nanogpt / "model.py").is_file():
        raise MissingInput(f"{arguments.nanogpt}/model.py: no such file; clone nanoGPT there")
    run, state, batches = prepared(arguments.override)
    forward: Any = torch.compile(state.model) if run.cfg.compile else state.model

    def ours() -> Tensor:
        state.step = 0
        return update(run.cfg, state, forward, batches, run.device, collecting=False)[0].loss

    theirs = nanogpt_step(arguments.nanogpt, run, batches)
    for step in (ours, theirs) * 3:  # compile and warm up
        step().item()
    pairs = [(milliseconds(ours), milliseconds(theirs)) for _ in range(STEPS)]
    a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(
        f"a step: {a:.1f} ms, nanoGPT's {b:.1f} ms; {b / a:.2f} times as many tokens a second on "
        f"{run.device}, {torch.get_num_threads()} threads"
    )


def milliseconds(step: Step) -> float:
    start = time.perf_counter()
    step().item()  # waits for the device
    return 1e3 * (time.perf_counter() - start)


def nanogpt_step(folder: Path, run: Run, batches: TrainBatches) -> Step:
    """A step of nanoGPT's train.py: fp32 on the CPU, bf16 autocast on CUDA."""
    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig

    m, o, accum = run.cfg.model, run.cfg.optim, run.cfg.train.grad_accum
    sizes = (m.block_size, run.data.tokenizer.n_vocab, m.n_layer, m.n_head, m.n_embd, m.dropout)
    with redirect_stdout(StringIO()):
        model: Any = GPT(GPTConfig(*sizes, bias=True)).to(run.device)
        betas = (o.beta1, o.beta2)
        optimizer = model.configure_optimizers(o.weight_decay, o.lr, betas, run.device.type)
    forward = torch.compile(model) if run.cfg.compile else model

    def step() -> Tensor:
        losses = []
        for x, y in batches.at(1, run.device):
            with autocast(run.device, "auto"):
                _, loss = forward(x, y.contiguous())
            (loss / accum).backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean()

    return step


if __name__ == "__main__":
    run(main)
