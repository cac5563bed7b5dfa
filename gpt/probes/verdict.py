"""What a model lets a token see, in words. It is found out in `leak.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FUTURE, NEIGHBOURS = "later tokens", "other samples"
UNKNOWN = "what cannot be told, for the probe's output is not finite"


def verdict(seen: Sequence[str]) -> str:
    """What to call a model of which `seen` is all that is known."""
    return "leaky" if {FUTURE, NEIGHBOURS} & set(seen) else "unknown"


@dataclass(frozen=True)
class Sight:
    """Of FUTURE, NEIGHBOURS and UNKNOWN: what some token's output depends on beside its past."""

    training: tuple[str, ...]
    evaluation: tuple[str, ...]

    @property
    def leaky(self) -> bool:
        """Whether training is known to see what it must not."""
        return verdict(self.training) == "leaky"

    def lines(self) -> list[str]:
        """For the console: what may not be compared, and why."""
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
    """`3.1415 (leaky)` or `3.1415 (unknown)`, where a model sees what it must not, or may."""
    return f"{text} ({verdict(seen)})" if seen else text
