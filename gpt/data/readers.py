"""Local files: which of them a path names, which split each belongs to, and the texts in them."""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from gpt.common.errors import ConfigError, DataError, MissingInput, nearest
from gpt.config import is_unicode

Document = tuple[str, str]  # ("train" | "val", text)
CHUNK = 1 << 20  # bytes of a text file that are in memory at a time
REPORT = {  # files beside runs that this program writes
    "report.html", "losses.png", "curves.png", "lr.png", "depth.png", "multirun.yaml",
    "table.csv", "table.md", "activations.csv", "activations.md",
}  # fmt: skip
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # the words in names of files and folders that give a split, as in `datasets`


@dataclass
class Files:
    """The files of a corpus.

    train     all files, or those of the split `train` if `val` has any
    val       the files of the split `validation`, otherwise those of `test`
    left_out  what is not read, and how often: {"hidden files": 2}
    """

    train: list[Path] = field(default_factory=list)
    val: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def find_files(path: str, suffixes: tuple[str, ...] = ()) -> Files:
    """The files that `path` names: a file, a folder, a glob, or several, with commas between.

    suffixes  of the files to take from a folder; all files by default

    No files if nothing of `path` exists. Raises MissingInput if only a part of it does.
    """
    left_out: Counter[str] = Counter()
    missing = []
    named: dict[Path, Path] = {}  # each file, and the part of its path that may name its split
    parts = [path] if Path(path).exists() else path.split(",")
    if not all(parts):
        raise ConfigError(f"data.path={path}: a part between the commas is empty; remove a comma")
    for part in parts:
        there = Path(part).exists()
        matches = [part] if there else sorted(glob.glob(part, recursive=True))
        for match in map(Path, matches):
            root = match.parent if there else constant_part(part)
            if there and match == Path(path) and match.is_dir():
                root = match
            for file in walk(match, suffixes, left_out) if match.is_dir() else [regular(match)]:
                named.setdefault(file, file.relative_to(root))
        missing += [part] if not matches else []
    if missing and (named or len(missing) > 1):
        raise MissingInput(f"data.path={path}: no such file: {', '.join(missing)}")
    once: dict[str, Path] = {}
    for file in named:
        once.setdefault(os.path.realpath(file), file)
    if len(named) > len(once):
        left_out["files named twice"] = len(named) - len(once)
    return by_split({file: named[file] for file in once.values()}, left_out)


def constant_part(pattern: str) -> Path:
    """The folders of a glob before its first wildcard."""
    return Path(*takewhile(lambda name: not set(name) & set("*?["), Path(pattern).parts))


def regular(file: Path) -> Path:
    if not file.is_file():
        raise DataError(f"data.path={file}: not a regular file")
    return file


def walk(folder: Path, suffixes: tuple[str, ...], left_out: Counter[str]) -> list[Path]:
    """The files below `folder`, sorted. Hidden files, links to folders, results of this program and
    files with other suffixes are counted in `left_out`."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk would skip a folder that it may not read

    files = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        for name in list(folders):
            path = Path(place, name)
            if name.startswith("."):
                reason = "hidden folders"
            elif path.is_symlink():
                reason = "links to folders"
            elif is_result(path):
                reason = "folders of runs or tokens"
            else:
                continue
            folders.remove(name)
            left_out[reason] += 1
        for name in names:
            if name.startswith("."):
                left_out["hidden files"] += 1
            elif suffixes and not name.lower().endswith(suffixes):
                left_out["files of other kinds"] += 1
            elif not Path(place, name).is_file():  # a pipe, or a link to nothing
                left_out["files that are not regular"] += 1
            else:
                files.append(Path(place, name))
    return sorted(files)


def is_result(folder: Path) -> bool:
    """Whether this program wrote the folder: a run, prepared tokens, or a folder of these alone. A
    text that contained its own results would change with every run."""
    names = {entry.name for entry in folder.iterdir()}
    begun = ".holder" in names  # a run that has no other files yet
    if begun or names >= {"config.yaml", "metrics.jsonl"} or names >= {"train.bin", "val.bin"}:
        return True
    inside = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
    files = names - {entry.name for entry in inside}
    only_results = all(name[0] == "." or name in REPORT for name in files)
    return bool(inside) and only_results and all(map(is_result, inside))


def by_split(below: dict[Path, Path], left_out: Counter[str]) -> Files:
    """Divide the files by their names, if these name `train` and another split."""
    named: dict[str, list[Path]] = {}
    for file, path in below.items():
        named.setdefault(split_of(path), []).append(file)
    other = next((name for name in ("validation", "test") if name in named), None)
    if "train" not in named or other is None:
        return Files(list(below), [], left_out)
    for name in named.keys() - {"train", other}:
        left_out[f"files of the split {name}" if name else "files of no split"] += len(named[name])
    return Files(named["train"], named[other], left_out)


def split_of(path: Path) -> str:
    """The split that a file's name gives, or else the nearest folder's name; "" if none does."""
    for part in reversed(path.parts):
        for split, words in SPLITS.items():
            if re.search(rf"(^|[-._ 0-9])({'|'.join(words)})([-._ 0-9]|$)", part.lower()):
                return split
    return ""


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


def read_jsonl(file: Path, column: str) -> Iterator[str]:
    """A JSON object in each line, or a JSON list of objects. Only `column` is looked at."""
    with file.open("rb") as lines:
        is_list = lines.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        lines.seek(0)
        rows: Iterator[tuple[int, Any]]
        if is_list:
            rows = enumerate(parse(lines.read(), f"{file}"), start=1)
        else:
            rows = (
                (number, parse(line, f"{file}: line {number}"))
                for number, line in enumerate(lines, start=1)
                if line.strip()
            )
        first = True
        for number, row in rows:
            if not isinstance(row, dict):
                raise DataError(f"{file}: line {number}: expected an object, {{…}}")
            if first:
                check_column(column, file, list(row))
                first = False
            yield checked(row.get(column), column, f"{file}: line {number}")


def parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error


def read_csv(file: Path, column: str) -> Iterator[str]:
    """Comma-separated cells below a header. A row with more or fewer cells is an error: its text
    would be shifted or lost."""
    csv.field_size_limit(2**31 - 1)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, strict=True)
        try:
            header = next(rows, [])
            check_column(column, file, header)
            at = header.index(column)
            for row in rows:
                if row and len(row) != len(header):
                    raise DataError(
                        f"{file}: line {rows.line_num} has {len(row)} cells, and the header has "
                        f"{len(header)}; put texts with commas in double quotes"
                    )
                if row:
                    yield row[at]
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 ({error.reason})") from error
        except csv.Error as error:
            raise DataError(f"{file}: after line {rows.line_num}: {error}") from error


def read_parquet(file: Path, column: str) -> Iterator[str]:
    """Only `column` is read, a thousand rows at a time."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        check_column(column, file, table.schema_arrow.names)
        for batch in table.iter_batches(1000, columns=[column]):
            for text in batch.column(0).to_pylist():
                yield checked(text, column, f"{file}")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: data.column={column} is not UTF-8 ({error.reason})") from error
    except pa.ArrowException as error:
        raise DataError(f"{file}: {' '.join(str(error).split())[:300]}") from error


def read_paragraphs(file: Path, column: str) -> Iterator[str]:
    """The paragraphs of a UTF-8 text: what stands between empty lines."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            rest = ""
            while chunk := lines.read(CHUNK):
                *whole, rest = (rest + chunk).split("\n\n")
                yield from filter(None, whole)
            if rest:
                yield rest
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason})") from error


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".jsonl": read_jsonl,
    ".json": read_jsonl,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".txt": read_paragraphs,
}


def checked(text: Any, column: str, where: str) -> str:
    """The text of a row; "" for a missing value."""
    if not isinstance(text, str | None):
        raise DataError(
            f"{where}: data.column={column} has a value of type {type(text).__name__}; "
            "expected text"
        )
    if text and not is_unicode(text):
        raise DataError(f"{where}: half of a surrogate pair, which UTF-8 cannot encode")
    return text or ""


def check_column(column: str, source: Path | str, columns: list[str]) -> None:
    if column not in columns:
        raise ConfigError(
            f"data.column={column}: {source} has {', '.join(columns)}{nearest(column, columns)}"
        )
    if columns.count(column) > 1:
        raise DataError(f"{source}: it has {columns.count(column)} columns {column}")
