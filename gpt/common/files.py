"""Files: atomic writes, and reads that tolerate an unfinished last line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from gpt.common.errors import DataError, MissingInput


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an OSError such as a full disk names `path`. Writing to an open file does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary file and rename it: `path` holds its old content or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path), temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line that a kill left unfinished is dropped.

    Any other damaged line raises DataError, because the rows after it would be lost too.
    """
    rows = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: line {number} is damaged; restore or remove it") from error
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; MissingInput if the file is missing, DataError if it is damaged."""
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise MissingInput(f"{path}: no such file") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error}); restore or remove it") from error


def write_manifest(path: Path, names: Iterable[str]) -> None:
    """Write to `path` the SHA-256 of each of the files `names` beside it."""
    write_json(path, {name: sha256(path.parent / name) for name in names})


def changed(path: Path, required: Iterable[str]) -> list[str]:
    """The files that differ from the manifest at `path` or are missing. It must list `required`."""
    manifest = read_json(path)
    beside = {name: path.parent / name for name in dict.fromkeys([*required, *manifest])}
    return [
        name
        for name, file in beside.items()
        if not file.is_file() or sha256(file) != manifest.get(name)
    ]


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def sha256(path: Path) -> str:
    return hash_file(path, hashlib.sha256())


def xxh3(path: Path) -> str:
    """A 128-bit checksum that finds accidental changes, several times as fast as SHA-256."""
    return hash_file(path, xxhash.xxh3_128())


def hash_file(path: Path, digest: Any) -> str:
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk; on Windows it skips folders."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flatten(values: dict[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one: {"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, separator, f"{prefix}{key}{separator}")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
