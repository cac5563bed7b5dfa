"""Where text comes from. A corpus yields documents, each marked `train` or `val`."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from gpt.common.errors import ConfigError, DataError, MissingInput, UserError
from gpt.common.hub import go_offline_if_unreachable
from gpt.config import DataConfig, check_choice
from gpt.data.readers import (
    READERS,
    Document,
    Files,
    check_column,
    checked,
    find_files,
    read_texts,
)

VAL_EVERY = 10  # every tenth document is validation


@dataclass(frozen=True)
class Corpus:
    """name       the name of its folder
    key        changes whenever the documents change; cheap to compute, without reading them
    documents  yields (split, text), the same at each call
    separate   whether documents are separate texts, to be kept apart by a separator token
    left_out   what is not in it, and how often: {"hidden files": 2}; complete once it was read
    """

    name: str
    key: str
    documents: Callable[[], Iterator[Document]]
    separate: bool = True
    left_out: Counter[str] = field(default_factory=Counter)


def open_corpus(cfg: DataConfig) -> Corpus:
    """The corpus that `data=` names. An unknown name raises ConfigError with the nearest one."""
    check_choice("data.name", cfg.name, tuple(CORPORA))
    return CORPORA[cfg.name](cfg)


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()


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
    """Every tenth text is validation; empty texts do not count."""
    i = 0
    for text in texts:
        yield ("val" if i % VAL_EVERY == offset else "train"), text
        i += bool(text)


def one_by_one(train: Iterable[str], val: Iterable[str]) -> Iterator[Document]:
    yield from (("train", text) for text in train)
    yield from (("val", text) for text in val)


def text(cfg: DataConfig) -> Corpus:
    """A UTF-8 file, or the files of a folder in order. The last tenth is validation, unless the
    files' names give splits."""
    path = Path(cfg.path or "")
    files = find_files(str(path))
    if not files.train:
        missing = "the folder has no readable file" if path.is_dir() else "no such file or folder"
        raise MissingInput(f"data.path={cfg.path}: {missing}")

    def documents() -> Iterator[Document]:
        if files.val:
            train, val = ((text for _, text in read_texts(fs)) for fs in (files.train, files.val))
            yield from one_by_one(train, val)
        else:
            yield from read_texts(files.train)

    key = digest(file_key(files.train), file_key(files.val))
    return Corpus(slug(path.name), key, documents, separate=False, left_out=files.left_out)


def hf(cfg: DataConfig) -> Corpus:
    """Local files (jsonl, parquet, csv, text), or a data set on the hub, through `datasets`.

    Its `validation` or `test` split is validation; without one, every tenth document is. A data
    set on the hub is identified by its name only: if it changes there, delete its folder in data/.
    """
    path = str(cfg.path)
    files = data_files(path)
    if files.train and cfg.subset:
        raise ConfigError(f"data.subset={cfg.subset}: local files have no subsets; leave it out")
    paths = [*files.train, *files.val]
    options = (str(cfg.subset), cfg.column, str(cfg.max_documents))
    keys = (file_key(files.train), file_key(files.val)) if paths else ("hub",)
    key = digest(path, *options, *keys)

    def documents() -> Iterator[Document]:
        train, val = splits_of_files(cfg, files) if paths else splits_of_hub(cfg, path)
        empty = 0
        for split, text in interleave(train) if val is None else one_by_one(train, val):
            if text:
                yield split, text
            else:
                empty += 1
        files.left_out["empty documents"] = empty

    return Corpus(slug(path), key, documents, left_out=files.left_out)


def data_files(path: str) -> Files:
    """The files that `path` names, which are of one kind; no files if it is a name on the hub."""
    files = find_files(path, tuple(READERS))
    kinds = sorted({f.suffix.lower() for f in files.train + files.val})
    if len(kinds) > 1 or not set(kinds) <= set(READERS):
        raise DataError(
            f"data.path={path}: files of {', '.join(k or 'no suffix' for k in kinds)}; expected "
            f"one kind of {', '.join(READERS)}"
        )
    if not kinds and Path(path).is_dir():
        raise MissingInput(f"data.path={path}: no file of {', '.join(READERS)} below it")
    if kinds and not any(f.stat().st_size for f in files.train):
        raise DataError(f"data.path={path}: it is empty")
    return files


Texts = Iterator[str]


def splits_of_files(cfg: DataConfig, files: Files) -> tuple[Texts, Texts | None]:
    """The texts of the splits, "" for a row without text; at most max_documents rows of each."""

    def texts(paths: list[Path]) -> Texts:
        rows = (text for f in paths for text in READERS[f.suffix.lower()](f, cfg.column))
        return islice(rows, cfg.max_documents)

    return texts(files.train), texts(files.val) if files.val else None


def splits_of_hub(cfg: DataConfig, path: str) -> tuple[Texts, Texts | None]:
    """The same of a data set on the hub, or in the cache if the hub cannot be reached."""
    offline = go_offline_if_unreachable()
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported below
    try:
        splits = datasets.load_dataset(path, cfg.subset, streaming=cfg.streaming)
    except Exception as error:  # the library raises many kinds for what it cannot read
        if offline and isinstance(error, ConnectionError | FileNotFoundError):
            raise MissingInput(
                f"data.path={path}: no such file, and the hub cannot be reached; give local "
                "jsonl, parquet, csv or text files, or use data=pydoc"
            ) from error
        raise unreadable(path, error) from error
    if "train" not in splits:
        raise DataError(f"data.path={path}: no split `train`; it has {', '.join(splits)}")
    val = next((name for name in ("validation", "test") if name in splits), None)

    def texts(rows: Any) -> Texts:
        try:
            for i, row in enumerate(islice(rows, cfg.max_documents)):
                if i == 0:
                    check_column(cfg.column, path, list(row))
                yield checked(row.get(cfg.column), cfg.column, f"data.path={path}: row {i + 1}")
        except UserError:
            raise
        except Exception as error:
            raise unreadable(path, error) from error

    return texts(splits["train"]), texts(splits[val]) if val else None


def unreadable(path: str, error: Exception) -> DataError:
    cause = error.__cause__ or error
    reason = " ".join(str(cause).split())[:300] or type(cause).__name__
    return DataError(f"data.path={path}: {reason}")


def file_key(files: list[Path]) -> str:
    """A hash of names, sizes and times, so that files need not be read. The change time is among
    them: unlike the modification time, no program can set it back."""
    stats = ((os.path.realpath(file), file.stat()) for file in files)
    return digest(
        *(f"{p} {s.st_size} {s.st_ino} {s.st_mtime_ns} {s.st_ctime_ns}" for p, s in stats)
    )


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:40].strip("._") or "text"


CORPORA: dict[str, Callable[[DataConfig], Corpus]] = {
    "pydoc": pydoc,
    "stdlib": stdlib,
    "text": text,
    "hf": hf,
}
