"""The norms: one file each. Importing this package imports them all, and each registers itself."""

import importlib
import pkgutil

from gpt.norms.registry import load_entry_points

for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")
load_entry_points()
