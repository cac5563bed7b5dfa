"""Where text comes from. A corpus yields documents, each marked `train` or `val`."""

from __future__ import annotations

import csv
import glob
import hashlib
import re
import socket
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from gpt.common.errors import ConfigError, DataError, MissingInput, UserError, nearest
from gpt.config import DataConfig, check_choice

Document = tuple[str, str]  # ("train" | "val", text)
CHUNK = 1 << 20  # bytes of a text file that are in memory at a time
VAL_EVERY = 10  # every tenth document is validation
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


@dataclass(frozen=True)
class Corpus:
    """name       the name of its folder
    key        changes whenever the documents change; cheap to compute, without reading them
    documents  yields (split, text), the same at each call
    separate   whether documents are separate texts, to be kept apart by a separator token
    """

    name: str
    key: str
    documents: Callable[[], Iterator[Document]]
    separate: bool = True


def open_corpus(cfg: DataConfig) -> Corpus:
    """The corpus that `data=` names; ConfigError, with the nearest name, if there is none."""
    check_choice("data.name", cfg.name, tuple(CORPORA))
    return CORPORA[cfg.name](cfg)


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def pydoc(cfg: DataConfig) -> Corpus:
    """The language reference in `pydoc_data`, split by topic.

    Topics quote each other at length (`compound` contains all of `if`, `for` and `while`): a fifth
    of the text occurs twice. A paragraph is kept once, in the largest topic that has it. Otherwise
    validation would contain training text.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise MissingInput("this Python comes without pydoc_data; use data=stdlib") from error
    seen: set[str] = set()
    texts = []
    for _, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = {" ".join(p.split()): p for p in re.split(r"\n\s*\n", text) if p.strip()}
        fresh = [p for words, p in paragraphs.items() if words not in seen]
        seen.update(paragraphs)
        if fresh:
            texts.append("\n\n".join(fresh) + "\n")
    return Corpus("pydoc", digest(*texts), lambda: interleave(texts, offset=5))


def stdlib(cfg: DataConfig) -> Corpus:
    """The sources of this Python's standard library, without tests and installed packages. The
    package `encodings` is left out too: its tables repeat each other, so that validation would
    contain training text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    files = [
        f
        for f in sorted(root.rglob("*.py"))
        if not skipped & set(f.relative_to(root).parts) and f.name != "topics.py"
    ]
    if not files:
        raise MissingInput(f"{root}: no sources of the standard library; use data=pydoc")
    texts = [f.read_bytes().decode("utf-8", errors="replace") for f in files]
    return Corpus("stdlib", digest(*texts), lambda: interleave(texts))


def interleave(texts: Iterable[str], offset: int = VAL_EVERY - 1) -> Iterator[Document]:
    for i, text in enumerate(texts):
        yield ("val" if i % VAL_EVERY == offset else "train"), text


def text(cfg: DataConfig) -> Corpus:
    """A UTF-8 file, or the files of a folder in order; the last tenth is validation."""
    path = Path(cfg.path or "")
    if not path.exists():
        raise MissingInput(f"data.path={cfg.path}: no such file or folder")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    files = [f for f in files if not any(p.startswith(".") for p in f.relative_to(path).parts)]
    if not files:
        raise MissingInput(f"data.path={cfg.path}: the folder holds no file")
    return Corpus(slug(path.name), file_key(files), lambda: read_texts(files), separate=False)


def read_texts(files: list[Path]) -> Iterator[Document]:
    """The files' bytes as they are (CRLF included), in chunks that end with a line.

    The cut between training and validation is at 90% of all bytes, moved to the next character.
    """
    cut = sum(f.stat().st_size for f in files) * 9 // 10
    done = 0
    for file in files:
        start = done
        with file.open("rb") as lines:
            while chunk := b"".join(lines.readlines(CHUNK)):
                at = min(max(cut - done, 0), len(chunk))
                while at < len(chunk) and chunk[at] & 0xC0 == 0x80:  # inside a character
                    at += 1
                offset = done - start
                if at > 0:
                    yield "train", decode(chunk[:at], file, offset)
                if at < len(chunk):
                    yield "val", decode(chunk[at:], file, offset + at)
                done += len(chunk)


def decode(part: bytes, file: Path, offset: int) -> str:
    try:
        return part.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not UTF-8 at byte {offset + error.start} ({error.reason}); "
            "convert it, for example with: iconv -t utf-8"
        ) from error


def hf(cfg: DataConfig) -> Corpus:
    """A data set through `datasets`: local files (jsonl, parquet, csv, text) or a name on the hub.

    Its `validation` or `test` split is validation; without one, every tenth document is. A data
    set on the hub is identified by its name only: if it changes there, delete its folder in data/.
    """
    path = str(cfg.path)
    files = local_files(path)
    if files and cfg.subset:
        raise ConfigError(f"data.subset={cfg.subset}: local files have no subsets; leave it out")
    options = (str(cfg.subset), cfg.column, str(cfg.max_documents))
    key = digest(path, *options, file_key(files) if files else "hub")
    return Corpus(slug(path), key, lambda: read_dataset(cfg, path, files))


def read_dataset(cfg: DataConfig, path: str, files: list[Path]) -> Iterator[Document]:
    if files and not any(file.stat().st_size for file in files):
        raise DataError(f"data.path={path}: it is empty")
    offline = not files and not hub_reachable()
    if offline:
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True  # use the cache, without half a minute of retries
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported below
    source: dict[str, Any] = {"path": path, "name": cfg.subset}
    try:
        if files:
            kind = KINDS[files[0].suffix.lower()]
            source = {"path": kind, "data_files": [glob.escape(str(f)) for f in files]}
            source |= options_of(kind, files, cfg)
        splits = datasets.load_dataset(**source, streaming=cfg.streaming)
        val = next((name for name in ("validation", "test") if name in splits), None)
        if "train" not in splits:
            raise DataError(f"data.path={path}: no split `train`; it has {', '.join(splits)}")
        train = texts_of(splits["train"], cfg)
        if val is None:
            yield from interleave(train)
        else:
            yield from (("train", text) for text in train)
            yield from (("val", text) for text in texts_of(splits[val], cfg))
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds for what it cannot read
        if offline and isinstance(error, ConnectionError | FileNotFoundError):
            raise MissingInput(
                f"data.path={path}: no such file, and the hub cannot be reached; give local "
                "jsonl, parquet, csv or text files, or use data=pydoc"
            ) from error
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise DataError(f"data.path={path}: {reason}") from error


def options_of(kind: str, files: list[Path], cfg: DataConfig) -> dict[str, Any]:
    """Options with which `datasets` leaves texts as they are written."""
    from datasets import Features, Value

    if kind == "text":
        return {"sample_by": "paragraph"}  # otherwise every line is a document
    if kind != "csv":
        return {}
    for file in files:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            check_column(cfg, next(csv.reader(lines), []))
    # Otherwise 00001 becomes 1, and NA becomes a missing value.
    return {"features": Features({cfg.column: Value("string")}), "keep_default_na": False}


def texts_of(rows: Any, cfg: DataConfig) -> Iterator[str]:
    """The column's texts, at most max_documents; a row without text is skipped."""
    for i, row in enumerate(rows):
        if i == cfg.max_documents:
            return
        check_column(cfg, row)
        text = row[cfg.column]
        if not isinstance(text, str | None):
            raise DataError(
                f"data.column={cfg.column}: {cfg.path} has values of type {type(text).__name__} "
                "there; expected text"
            )
        if text:
            yield text


def check_column(cfg: DataConfig, columns: Iterable[str]) -> None:
    if cfg.column not in columns:
        raise ConfigError(
            f"data.column={cfg.column}: {cfg.path} has {', '.join(columns)}"
            + nearest(cfg.column, columns)
        )


def local_files(path: str) -> list[Path]:
    """The data files that `path` names: a file, a folder, a glob, or several, with commas between.

    Empty if `path` can only be a name on the hub. Raises UserError if a part of it is missing, if a
    file is of a kind that cannot be read, or if the files are of several kinds.
    """
    files: list[Path] = []
    missing: list[str] = []
    for part in [path] if Path(path).exists() else path.split(","):
        found = [Path(part)]
        if not found[0].exists():
            found = [Path(p) for p in sorted(glob.glob(part))] or found
        if found[0].is_dir():
            found = sorted(f for f in found[0].rglob("*") if f.suffix.lower() in KINDS)
        found = [f for f in found if f.is_file()]
        files += found
        missing += [] if found else [part]
    if missing and (files or len(missing) > 1):
        raise MissingInput(f"data.path={path}: no such file: {', '.join(missing)}")
    kinds = sorted({f.suffix.lower() for f in files})
    if len(kinds) > 1 or not set(kinds) <= set(KINDS):
        raise DataError(
            f"data.path={path}: files of {', '.join(k or 'no suffix' for k in kinds)}; expected "
            f"one kind of {', '.join(KINDS)}"
        )
    return files


def hub_reachable(timeout: float = 0.5) -> bool:
    """Whether the hub answers within `timeout` seconds; true if a proxy is configured."""
    from huggingface_hub.constants import ENDPOINT

    address = urlsplit(ENDPOINT)
    if address.scheme in getproxies():
        return True
    port = address.port or (443 if address.scheme == "https" else 80)
    answered: list[bool] = []

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection((address.hostname or "", port), timeout).close()
            answered.append(True)

    thread = Thread(target=connect, daemon=True)  # a name lookup has no timeout
    thread.start()
    thread.join(timeout)
    return bool(answered)


def file_key(files: list[Path]) -> str:
    """A hash of names, sizes and times, so that files need not be read."""
    return digest(*(f"{f.resolve()} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files))


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:40].strip("._") or "text"


CORPORA: dict[str, Callable[[DataConfig], Corpus]] = {
    "pydoc": pydoc,
    "stdlib": stdlib,
    "text": text,
    "hf": hf,
}
