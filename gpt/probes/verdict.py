"""Words for what a model lets a token see, which `leak.py` finds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FUTURE, NEIGHBOURS = "later tokens", "other samples"
UNKNOWN = "something unknown, since the probe's output is not finite"


def verdict(seen: Sequence[str]) -> str:
    """`leaky` or `unknown`: the word for a model whose tokens see `seen`."""
    return "leaky" if {FUTURE, NEIGHBOURS} & set(seen) else "unknown"


@dataclass(frozen=True)
class Sight:
    """What a token's output depends on besides its past: any of FUTURE, NEIGHBOURS, UNKNOWN."""

    training: tuple[str, ...]
    evaluation: tuple[str, ...]

    @property
    def leaky(self) -> bool:
        """Whether tokens are known to see later tokens or other samples in training."""
        return verdict(self.training) == "leaky"

    def lines(self) -> list[str]:
        """Lines for the console: which losses are not comparable, and why."""
        lines = []
        if self.training:
            lines.append(
                f"{verdict(self.training)}: in training tokens see {' and '.join(self.training)}; "
                "this run's training loss is not comparable"
            )
        if self.evaluation:
            lines.append(
                f"{verdict(self.evaluation)}: in evaluation tokens see "
                f"{' and '.join(self.evaluation)}; this run's validation loss is not a result"
            )
        return lines


def marked(text: str, seen: Sequence[str]) -> str:
    """`3.1415 (leaky)` or `3.1415 (unknown)`; `text` alone if nothing is seen."""
    return f"{text} ({verdict(seen)})" if seen else text
