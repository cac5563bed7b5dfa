"""Where files are: the configuration's, and the token files."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = PACKAGE.parent / "configs"


def data_root() -> Path:
    """Where token files land: in data/ beside the sources, or where GPT_DATA says."""
    return Path(os.environ.get("GPT_DATA", PACKAGE.parent / "data"))
