"""Small corpora for tests."""

from __future__ import annotations

import json
from pathlib import Path


def jsonl(path: Path, n: int = 40) -> Path:
    rows = ({"text": f"document {i}: " + "some words " * 20, "id": i} for i in range(n))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
