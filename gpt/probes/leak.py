"""The leak probe, which checks every run: what does a token see besides its past?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from gpt.common.device import autocast, seed_device
from gpt.common.errors import ConfigError
from gpt.norms.base import changes, norm_step, norms_of
from gpt.norms.registry import USER
from gpt.probes.verdict import FUTURE, NEIGHBOURS, UNKNOWN, Sight


@torch.no_grad()
def probe(model: nn.Module, vocab_size: int, block_size: int, steps: int, dtype: str) -> Sight:
    """Change tokens of one sample and see which outputs of other positions and samples change.

    The probe runs in training mode, with gradients enabled as there, and in evaluation mode. It
    runs as at the first training step and, if a norm depends on the step, as at the last one. It
    uses the run's `dtype`, since each has its own kernels. Its weights are random, since initial
    ones may hide what training brings out (a γ or a branch that starts at 0). Afterwards the model
    is in training mode and has its weights and buffers back.

    Raises ConfigError if a user's norm cannot be probed.
    """
    kept = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    generator = torch.Generator().manual_seed(0)
    T = min(block_size, 128)
    idx = torch.randint(vocab_size, (4, T), generator=generator).to(next(model.parameters()).device)
    changing = any(changes(norm) for norm in norms_of(model))
    randomise(model, generator)

    def sight() -> tuple[str, ...]:
        found = set()
        for step in (1, steps) if changing else (1,):
            output = partial(run_once, model, kept=kept, step=step, steps=steps, dtype=dtype)
            found |= seen_by(output, idx, vocab_size)
        return tuple(what for what in (FUTURE, NEIGHBOURS, UNKNOWN) if what in found)

    model.eval()
    evaluation = sight()
    model.train()
    training = sight()
    for name, tensor in tensors_of(model).items():
        tensor.copy_(kept[name])
    for norm in norms_of(model):
        norm.begin_step(1, steps)
    return Sight(training, evaluation)


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Xavier-like matrices; noise on vectors such as γ and β."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter.shape[1] ** 0.5)
        else:
            parameter.add_(0.5 * noise)


def run_once(
    model: nn.Module, tokens: Tensor, kept: dict[str, Tensor], step: int, steps: int, dtype: str
) -> Tensor:
    """Logits (B, T, V) for `tokens`, from the buffers in `kept` and always the same dropout."""
    for name, buffer in model.named_buffers():
        if name not in kept:
            raise ConfigError(f"{name}: the buffer appeared later; register it in the constructor")
        buffer.copy_(kept[name])
    seed_device(tokens.device, 0)
    grad = torch.set_grad_enabled(model.training)
    try:
        with norm_step(model, step, steps), grad, autocast(tokens.device, dtype):
            return model(tokens)[0].detach().float()
    except Exception as error:
        if not any(type(norm).__module__.startswith(USER) for norm in norms_of(model)):
            raise
        given = f"norm.module: with {len(tokens)} samples of {tokens.shape[1]} tokens"
        raise ConfigError(f"{given} {type(error).__name__}: {error}") from error


def seen_by(output: Callable[[Tensor], Tensor], idx: Tensor, vocab_size: int) -> set[str]:
    """Which of FUTURE, NEIGHBOURS and UNKNOWN the outputs of `idx` (B, T) depend on.

    The first, third or last sample is changed, since a norm may look only at a part of the batch:
    all its tokens from the first, second, middle or last one on.
    """
    B, T = idx.shape
    found = set()
    unchanged = output(idx)
    for sample, first in product((0, 2, B - 1), sorted({0, min(1, T - 1), T // 2, T - 1})):
        other = idx.clone()
        other[sample, first:] = (other[sample, first:] + 1) % vocab_size
        change = (output(other) - unchanged).abs()
        if not bool(change.isfinite().all()):
            found.add(UNKNOWN)
        # Kernels on some devices round differently; that alone does not count.
        seen = change > 1e-5 * change[sample, first:].max()
        if bool(seen[sample, :first].any()):
            found.add(FUTURE)
        if bool(seen[:sample].any() or seen[sample + 1 :].any()):
            found.add(NEIGHBOURS)
    return found


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as they are now: a norm may bind a buffer anew."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def refuse_leaks(sight: Sight) -> None:
    """Raise ConfigError if anything is seen; for `strict_causal=true`."""
    for mode, seen in (("training", sight.training), ("evaluation", sight.evaluation)):
        if seen:
            raise ConfigError(
                f"strict_causal=true: in {mode} tokens see {' and '.join(seen)}; "
                "take another norm, or strict_causal=false"
            )
