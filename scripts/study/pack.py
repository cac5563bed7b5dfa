"""Pack what the report reads of the study's runs, except their statistics, into runs.tar.xz."""

import shutil
import tarfile
import tempfile
from pathlib import Path

from gpt.common.files import write_manifest

FILES = ("config.yaml", "summary.json", "metrics.jsonl")


def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and time, so that equal runs give an equal archive."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    entry.mtime = 1_795_824_000  # 2026-11-28
    return entry


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder, "runs")
        for question in ("norms", "depth", "others", "warmup", "longer"):
            for run in sorted(path.parent for path in Path("runs", question).glob("*/DONE")):
                copy = packed / question / run.name
                copy.mkdir(parents=True)
                for name in FILES:
                    shutil.copy(run / name, copy)
                rows = (run / "metrics.jsonl").read_text().splitlines(True)
                evaluations = [row for row in rows if "val_loss" in row]
                (copy / "metrics.jsonl").write_text("".join(evaluations))
                write_manifest(copy / "DONE", FILES)
        with tarfile.open(Path(__file__).with_name("runs.tar.xz"), "w:xz") as archive:
            archive.add(packed, "runs", filter=plain)


if __name__ == "__main__":
    main()
