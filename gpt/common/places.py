"""Where files are: the configuration's, and the token files."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "configs" / "train.yaml").exists() else None
CONFIGS = (CHECKOUT or PACKAGE) / "configs"  # an installed package brings its own


def data_root() -> Path:
    """Where token files land: where GPT_DATA says, or in data/ of a checkout, or in the cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-norms" / "data"
    return Path(os.environ.get("GPT_DATA") or (CHECKOUT / "data" if CHECKOUT else cache))
