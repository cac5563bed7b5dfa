"""The locations of the configuration and of the token files."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "configs" / "train.yaml").exists() else None
CONFIGS = (CHECKOUT or PACKAGE) / "configs"  # an installed package has its own


def home(path: str) -> str:
    """`path` with a leading ~ expanded, which a shell leaves as it is in `key=~/folder`."""
    return os.path.expanduser(path)


def data_root() -> Path:
    """The folder of token files: GPT_DATA, otherwise a checkout's data/, otherwise the cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-norms" / "data"
    return Path(home(os.environ.get("GPT_DATA", "")) or (CHECKOUT / "data" if CHECKOUT else cache))
