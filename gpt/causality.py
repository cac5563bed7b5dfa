"""What a model lets a token see, found by changing it: the causality gate of every run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpt.errors import ConfigError
from gpt.norms.registry import begin_step

FUTURE, NEIGHBOURS = "later tokens", "other samples"


@dataclass(frozen=True)
class Sight:
    """What of FUTURE and NEIGHBOURS some token's output depends on, in training and evaluation."""

    training: tuple[str, ...]
    evaluation: tuple[str, ...]

    def lines(self) -> list[str]:
        """For the console: what may not be compared, and why."""
        lines = []
        if self.training:
            lines.append(
                f"leaky: in training tokens see {' and '.join(self.training)}; this run's training "
                "loss is not comparable"
            )
        if self.evaluation:
            lines.append(
                f"leaky: in evaluation tokens see {' and '.join(self.evaluation)}; this run's "
                "validation loss is not a result"
            )
        return lines


@torch.no_grad()
def probe(model: nn.Module, vocab_size: int, block_size: int, steps: int) -> Sight:
    """Change the last token of one sample and look which other outputs change.

    Once as at the first training step and once as at the last, since some norms change on the way.
    The model is left in training mode, all its buffers as they were.
    """
    device = next(model.parameters()).device
    B, T = 4, min(8, block_size)
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(vocab_size, (B, T), generator=generator).to(device)
    other = idx.clone()
    other[0, -1] = (other[0, -1] + 1) % vocab_size
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def restore() -> None:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])

    def output(tokens: Tensor, step: int) -> Tensor:
        restore()
        begin_step(model, step, steps)
        torch.manual_seed(0)  # the same dropout in both
        return model(tokens)[0].float()

    def sight(step: int) -> set[str]:
        change = (output(idx, step) - output(other, step)).abs()
        # A change in rounding alone, which some devices' kernels may show, is no sight.
        least = 1e-6 * change[0, -1].max()
        places = {FUTURE: change[0, :-1], NEIGHBOURS: change[1:]}
        return {name for name, c in places.items() if c.numel() and bool((c > least).any())}

    def both_ends() -> tuple[str, ...]:
        found = sight(1) | sight(steps)
        return tuple(s for s in (FUTURE, NEIGHBOURS) if s in found)

    model.eval()
    evaluation = both_ends()
    model.train()
    training = both_ends()
    restore()
    return Sight(training, evaluation)


def refuse_leaks(sight: Sight) -> None:
    """ConfigError, for `strict_causal=true`, where there is anything to see."""
    for mode, seen in (("training", sight.training), ("evaluation", sight.evaluation)):
        if seen:
            raise ConfigError(
                f"strict_causal=true: in {mode} tokens see {' and '.join(seen)}; "
                "take another norm, or strict_causal=false"
            )
