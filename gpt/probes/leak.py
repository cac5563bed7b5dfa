"""What a model lets a token see, found by changing it: the causality gate of every run."""

from __future__ import annotations

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
    """Change one of four samples (the first, third or last: a norm may look at a part of the batch
    alone) from its first, second, middle or last token on, and see which other outputs change.

    Once as at the first training step and, if a norm changes on the way, once as at the last;
    in training with gradients on, as there; in the run's `dtype`, since other kernels may be at
    work in it; and with random weights, since initial ones may hide what training brings out (a γ
    or a branch that starts at 0). The model is left in training mode, its weights and buffers as
    they were. ConfigError where a norm of the user's cannot do this.
    """
    kept = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    T = min(block_size, 128)
    idx = torch.randint(vocab_size, (4, T), generator=generator).to(device)
    places = list(product((0, 2, 3), sorted({0, min(1, T - 1), T // 2, T - 1})))
    changing = any(changes(norm) for norm in norms_of(model))

    def output(tokens: Tensor, step: int) -> Tensor:
        for name, buffer in model.named_buffers():
            if name not in kept:
                raise ConfigError(f"{name}: it was not there from the start; give it a tensor then")
            buffer.copy_(kept[name])
        seed_device(device, 0)  # the same dropout in both
        grad = torch.set_grad_enabled(model.training)
        try:
            with norm_step(model, step, steps), grad, autocast(device, dtype):
                return model(tokens)[0].detach().float()
        except Exception as error:
            if not any(type(norm).__module__.startswith(USER) for norm in norms_of(model)):
                raise
            given = f"norm.module: with {len(idx)} samples of {T} tokens"
            raise ConfigError(f"{given} {type(error).__name__}: {error}") from error

    def sight() -> tuple[str, ...]:
        found = set()
        for step in (1, steps) if changing else (1,):
            unchanged = output(idx, step)
            for sample, first in places:
                other = idx.clone()
                other[sample, first:] = (other[sample, first:] + 1) % vocab_size
                change = (output(other, step) - unchanged).abs()
                if not bool(change.isfinite().all()):
                    found.add(UNKNOWN)
                # A change in rounding alone, which some devices' kernels may show, is no sight.
                seen = change > 1e-5 * change[sample, first:].max()
                if bool(seen[sample, :first].any()):
                    found.add(FUTURE)
                if bool(seen[:sample].any() or seen[sample + 1 :].any()):
                    found.add(NEIGHBOURS)
        return tuple(what for what in (FUTURE, NEIGHBOURS, UNKNOWN) if what in found)

    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter.shape[1] ** 0.5)
        else:
            parameter.add_(0.5 * noise)
    model.eval()
    evaluation = sight()
    model.train()
    training = sight()
    for name, tensor in tensors_of(model).items():
        tensor.copy_(kept[name])
    for norm in norms_of(model):
        norm.begin_step(1, steps)
    return Sight(training, evaluation)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """As they are now: a norm may bind a buffer anew instead of writing into it."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def refuse_leaks(sight: Sight) -> None:
    """ConfigError, for `strict_causal=true`, where there is anything to see."""
    for mode, seen in (("training", sight.training), ("evaluation", sight.evaluation)):
        if seen:
            raise ConfigError(
                f"strict_causal=true: in {mode} tokens see {' and '.join(seen)}; "
                "take another norm, or strict_causal=false"
            )
