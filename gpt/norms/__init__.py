"""The norms: one file each. Importing this package imports them all, and each registers itself.

`from gpt.norms import RMSNorm, Norm, norm_step, register`
"""

import importlib
import pkgutil
from typing import Any

from gpt.norms.base import Norm as Norm
from gpt.norms.base import norm_step as norm_step
from gpt.norms.base import wide as wide
from gpt.norms.registry import NORMS, load_entry_points
from gpt.norms.registry import register as register

for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")
load_entry_points()


def __getattr__(name: str) -> Any:
    """Look up a registered norm by its class name."""
    for cls in NORMS.values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"gpt.norms has no {name!r}")
