"""Norms by name. A norm is one file here and one yaml in `configs/norm/`.

    @register("scale")
    class ScaleNorm(nn.Module):
        axes, causal_in_training, batch_independent = ("C",), True, True

        def __init__(self, n_embd: int, *, eps: float = 1e-5) -> None: ...

The keyword arguments of the constructor are the norm's configuration: their names and types are
the schema, and a value they refuse with `ValueError` is reported as a configuration error.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, get_args

from torch import nn

from gpt.errors import ConfigError, nearest

NORMS: dict[str, type[nn.Module]] = {}

CLAIMS = ("axes", "causal_in_training", "batch_independent")


def register(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator. The class says what it is, and the tests probe whether that is true:

    axes                the axes of (B, T, C) that its statistics run over
    causal_in_training  no output depends on a later token
    batch_independent   no output depends on another sample
    """

    def decorate(cls: type[nn.Module]) -> type[nn.Module]:
        if name in NORMS:
            raise ValueError(f"norm {name!r} is registered twice: {NORMS[name]} and {cls}")
        missing = [claim for claim in CLAIMS if not hasattr(cls, claim)]
        if missing:
            raise ValueError(f"norm {name!r} does not declare {', '.join(missing)}")
        NORMS[name] = cls
        return cls

    return decorate


def norm_class(name: str) -> type[nn.Module]:
    """The registered class, or the one-line error with the nearest name."""
    if name not in NORMS:
        raise ConfigError(f"norm={name}: expected one of {', '.join(NORMS)}{nearest(name, NORMS)}")
    return NORMS[name]


def build_norm(name: str, n_embd: int, **options: Any) -> nn.Module:
    """A norm over `n_embd` features; `options` are checked against the constructor's signature."""
    cls = norm_class(name)
    parameters = inspect.signature(cls, eval_str=True).parameters
    known = {k: p for k, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for key, value in options.items():
        where = f"configs/norm/{name}.yaml: norm.{key}={value}"
        if key not in known:
            raise ConfigError(
                f"{where}: norm {name!r} takes {', '.join(known) or 'no options'}"
                + nearest(key, known)
            )
        expected = known[key].annotation
        if not accepts(expected, value):
            raise ConfigError(f"{where}: expected {getattr(expected, '__name__', expected)}")
    try:
        return cls(n_embd, **options)
    except ValueError as error:
        raise ConfigError(f"configs/norm/{name}.yaml: {error}") from error


def accepts(annotation: Any, value: Any) -> bool:
    """Whether `value` fits a parameter of type `annotation`; float takes any finite number."""
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value)
    alternatives = get_args(annotation)  # of `int | None`
    return any(accepts(a, value) for a in alternatives) or type(value) is annotation


def sees_others(module: nn.Module) -> bool:
    """Whether a token's output in training holds later tokens or other samples: `leaky`."""
    return any(
        not (norm.causal_in_training and norm.batch_independent) for norm in norms_of(module)
    )


def norms_of(module: nn.Module) -> list[Any]:
    """Every registered norm inside `module`, in order."""
    return [m for m in module.modules() if type(m) in NORMS.values()]
