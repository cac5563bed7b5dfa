"""Norms by name. A norm is one file here and one yaml in `configs/norm/`.

    @register("scale")
    class ScaleNorm(Norm):
        axes = ("C",)

        def __init__(self, n_embd: int, *, eps: float = 1e-5) -> None: ...

The keyword arguments of the constructor are the norm's configuration: their names and types are
the schema. A ValueError of the constructor is reported as a configuration error.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import entry_points
from pathlib import Path
from traceback import extract_tb
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from gpt.common.errors import ConfigError, MissingInput, nearest
from gpt.config import check_choice
from gpt.norms.base import Norm, norm_step

NORMS: dict[str, type[Norm]] = {}
N = TypeVar("N", bound=Norm)
USER = "gpt_norms_user_"  # the prefix of the names of modules that `load_module` has run


def register(name: str) -> Callable[[type[N]], type[N]]:
    """Class decorator: registers a norm under this name. The tests check its declarations."""

    def decorate(cls: type[N]) -> type[N]:
        if name in NORMS:
            raise ValueError(f"norm {name!r} is registered twice: {NORMS[name]} and {cls}")
        if not issubclass(cls, Norm):
            raise ValueError(f"norm {name!r}: {cls.__name__} is not a subclass of gpt.norms.Norm")
        declared = any("axes" in vars(base) for base in cls.__mro__ if base is not Norm)
        if not declared or not set(cls.axes) <= {"B", "T", "C"}:
            raise ValueError(f"norm {name!r} does not declare axes, a subset of ('B', 'T', 'C')")
        NORMS[name] = cls
        return cls

    return decorate


def norm_class(name: str) -> type[Norm]:
    """The registered class. An unknown name raises ConfigError with the nearest one."""
    check_choice("norm", name, tuple(sorted(NORMS)))
    return NORMS[name]


def load_module(path: str) -> None:
    """Run a user's Python file, which registers its norms; a second call does nothing.

    It is only called with a path from the command line.
    """
    file = Path(path).expanduser().resolve()
    name = USER + file.stem
    if not file.is_file():
        raise MissingInput(f"norm module {path}: no such file")
    if getattr(sys.modules.get(name), "__file__", None) == str(file):
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"norm module {path}: expected a Python file, *.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"norm module {path}: {where_and_what(error, file)}") from error
    sys.modules[name] = module


def where_and_what(error: BaseException, file: Path) -> str:
    """`line 7, TypeError: …`: the last line of the user's file in the traceback, and the error."""
    lines = [f.lineno for f in extract_tb(error.__traceback__) if f.filename == str(file)]
    where = f"line {lines[-1]}, " if lines else ""
    return f"{where}{type(error).__name__}: {error}"


def load_entry_points() -> None:
    """Import the norms that installed packages offer under the entry point group `gpt_norms`."""
    for point in entry_points(group="gpt_norms"):
        try:
            point.load()
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"entry point {point.name} = {point.value}: {type(error).__name__}: {error}; fix "
                "or uninstall its package"
            ) from error


def build_norm(name: str, n_embd: int, module: str | None = None, **options: Any) -> Norm:
    """A norm over `n_embd` features; `options` are checked against the constructor's signature.

    module  the user's file that registered it. It is not run here, because a configuration in a run
            directory must not be able to run code. `load_module` runs it if the command names it
    """
    if module is not None and name not in NORMS:
        if USER + Path(module).stem not in sys.modules:
            raise ConfigError(
                f"norm={name}: {module} registers it, and only runs if the command names it: "
                f"norm_module={module} (train.py: norm.module={module})"
            )
        own = [n for n, cls in NORMS.items() if cls.__module__ == USER + Path(module).stem]
        raise ConfigError(f"norm={name}: {module} registers {', '.join(own) or 'no norm'}")
    cls = norm_class(name)
    options = checked(name, cls, options)
    try:
        norm: Norm = cls(n_embd, **options)  # type: ignore[call-arg]
        if cls.__module__.startswith(USER):
            try_out(norm, n_embd)
    except ValueError as error:
        raise ConfigError(f"norm={name}: {error}") from error
    except Exception as error:
        if not cls.__module__.startswith(USER):
            raise
        file = Path(str(sys.modules[cls.__module__].__file__))
        raise ConfigError(f"{file}: norm {name!r}: {where_and_what(error, file)}") from error
    norm.started = {key: p.detach().clone() for key, p in norm.named_parameters()}
    return norm


def checked(name: str, cls: type[Norm], options: dict[str, Any]) -> dict[str, Any]:
    """The options, with integers made floats where declared so; ConfigError if one is wrong."""
    parameters = inspect.signature(cls, eval_str=True).parameters
    known = {k: p for k, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for key, value in options.items():
        where = f"norm.{key}={value}"
        if key not in known:
            takes = ", ".join(known) or "no options"
            raise ConfigError(f"{where}: norm {name!r} takes {takes}{nearest(key, known)}")
        expected = known[key].annotation
        if not accepts(expected, value):
            kind = getattr(expected, "__name__", expected)
            kind = "a finite number" if expected is float else kind
            raise ConfigError(f"{where}: expected {kind}")
    missing = [k for k, p in known.items() if p.default is p.empty and k not in options]
    if missing:
        raise ConfigError(f"norm={name}: norm.{missing[0]} is not given")
    return {k: float(v) if known[k].annotation is float else v for k, v in options.items()}


def try_out(norm: Norm, n_embd: int) -> None:
    """Raise TypeError if a user's norm does not return a tensor of its input's shape."""
    x, copy = torch.randn(2, 2, n_embd), deepcopy(norm)
    with norm_step(copy, 1, 1):
        y = copy(x)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"its forward returned {got}; expected a tensor of {tuple(x.shape)}")


def accepts(annotation: Any, value: Any) -> bool:
    """Whether `value` fits a parameter of type `annotation`; float takes any finite number."""
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value)
    alternatives = get_args(annotation)  # int and None, of `int | None`
    return any(accepts(a, value) for a in alternatives) or type(value) is annotation


def name_of(norm: Norm) -> str:
    """The name that a norm is registered under; otherwise the name of its class."""
    names = (name for name, cls in NORMS.items() if type(norm) is cls)
    return next(names, type(norm).__name__)


def sizes(name: str, block_size: int) -> dict[str, Any]:
    """The options of norm `name` that follow from the model's sizes."""
    takes = inspect.signature(norm_class(name)).parameters
    return {"block_size": block_size} if "block_size" in takes else {}


def fitting(name: str, width: int) -> dict[str, int]:
    """A value for each option of norm `name` that must divide `width`.

    It is the default if that divides `width`; otherwise the smallest divisor between 1 and `width`,
    both excluded; otherwise 1.
    """
    cls = norm_class(name)
    parameters = inspect.signature(cls).parameters
    divisors = [d for d in range(2, width) if width % d == 0] or [1]
    defaults = {key: parameters[key].default for key in cls.divisors}
    return {k: d if d in divisors else divisors[0] for k, d in defaults.items()}
