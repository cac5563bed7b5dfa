"""`data=hf`: files and names on the hub become documents, through `datasets`."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.common.errors import ConfigError, DataError, MissingInput
from gpt.config import DataConfig
from gpt.data.corpus import open_corpus
from gpt.data.tokens import prepare
from tests.tools.configs import make_config, mostly_long, overrides
from tests.tools.hub_server import hub_server
from tests.tools.programs import run_program


def jsonl(path: Path, n: int = 40) -> Path:
    rows = ({"text": f"document {i}: " + "some words " * 20, "id": i} for i in range(n))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("streaming", ["true", "false"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_hf_files_are_documents_mapped_and_streaming(
    tmp_path: Path, kind: str, streaming: str
) -> None:
    path = jsonl(tmp_path / "docs.jsonl")
    if kind == "parquet":
        import pandas

        pandas.read_json(path, lines=True).to_parquet(path.with_suffix(".parquet"))
        path = path.with_suffix(".parquet")
    data = prepare(make_config("data=hf", f"data.path={path}", f"data.streaming={streaming}"))
    text = data.tokenizer.decode(data.val.ids.tolist())
    assert [f"document {i}:" in text for i in range(40)] == [i % 10 == 9 for i in range(40)]
    assert data.train.header.n_tokens == data.train.header.n_bytes + 2 * 36  # an empty line between


@pytest.mark.parametrize("name", ["x[1].jsonl", "a, b.jsonl", "a*.jsonl"])
def test_hf_reads_a_file_that_is_there_whatever_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(40)))
    documents = list(open_corpus(DataConfig("hf", str(path))).documents())
    assert [split for split, _ in documents].count("val") == 4


@pytest.mark.parametrize("pattern", ["*.jsonl", ""])
def test_hf_reads_the_files_that_a_pattern_names_or_a_folder_holds(
    tmp_path: Path, pattern: str
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "README.md").write_text("no data")
    corpus = open_corpus(DataConfig("hf", str(tmp_path / pattern)))
    assert [text for _, text in corpus.documents()] == ["a", "b"]


def test_hf_takes_at_most_max_documents_and_names_the_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "docs.jsonl")
    few = prepare(make_config("data=hf", f"data.path={path}", "data.max_documents=10"))
    assert "document 10" not in few.tokenizer.decode(few.train.ids.tolist())
    with pytest.raises(ConfigError, match=r"data.max_documents=0: expected an integer >= 1"):
        make_config("data=hf", f"data.path={path}", "data.max_documents=0")
    with pytest.raises(ConfigError, match=r"data.column=txt: .* has text, id; did you mean 'text'"):
        prepare(make_config("data=hf", f"data.path={path}", "data.column=txt"))


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ("a.jsonl,none.jsonl", "no such file: .*none.jsonl"),
        ("a.bin", "files of .bin; expected one kind of .jsonl"),
        ("a.jsonl,b.csv", "files of .csv, .jsonl"),
    ],
)
def test_hf_files_that_cannot_be_read_never_become_a_name_on_the_hub(
    tmp_path: Path, files: str, error: str
) -> None:
    for name in ("a.jsonl", "a.bin", "b.csv"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    path = ",".join(str(tmp_path / name) for name in files.split(","))
    with pytest.raises((DataError, MissingInput), match=error):
        open_corpus(DataConfig("hf", path))


@pytest.mark.parametrize("streaming", [True, False])
def test_hf_leaves_texts_as_they_are_written(tmp_path: Path, streaming: bool) -> None:
    """A csv cell stays text, the word NA is not a missing value, a line is not a document."""
    cells = ["00001", "NA", "None", "1.50", "true", "2020-01-01", 'a "quoted", word', "two\nlines"]
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("id", "text"), (9, ""), *enumerate(cells)])
    documents = open_corpus(DataConfig("hf", str(tmp_path / "a.csv"), streaming=streaming))
    assert [text for _, text in documents.documents()] == cells
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    documents = open_corpus(DataConfig("hf", str(tmp_path / "a.txt"), streaming=streaming))
    assert [text for _, text in documents.documents()] == ["one\ntwo", "three\n"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "2020-01-01"}\n' * 3, "has values of type datetime there; expected text"),
        ('{"text": 5}\n' * 3, "has values of type int there; expected text"),
        ('{"text": ["a"]}\n' * 3, "has values of type list there; expected text"),
    ],
)
def test_hf_refuses_a_column_of_no_text(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        list(open_corpus(DataConfig("hf", str(tmp_path / "a.jsonl"))).documents())


def test_hf_names_the_columns_of_a_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,txt\n1,a\n")
    with pytest.raises(ConfigError, match=r"has id, txt; did you mean 'txt'"):
        list(open_corpus(DataConfig("hf", str(tmp_path / "a.csv"))).documents())


def test_hf_rows_without_text_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": null}\n' + '{"text": "' + "words " * 50 + '"}\n' * 1)
    path.write_text(path.read_text() * 20)
    assert prepare(make_config("data=hf", f"data.path={path}")).train.header.n_bytes > 0


@pytest.mark.parametrize(
    ("content", "error"),
    [("", "it is empty"), ('{"text": "fine"}\n{"text": ', "JSON parse error")],
)
def test_a_damaged_file_is_one_line_and_65(tmp_path: Path, content: str, error: str) -> None:
    """The messages that `datasets` has for it are not shown."""
    path = tmp_path / "docs.jsonl"
    path.write_text(content)
    args = overrides("data=hf", f"data.path={path}", f"run_dir={tmp_path}/run")
    result = run_program(*args, GPT_DATA=str(tmp_path / "data"))
    assert result.returncode == 65
    assert result.stderr.count("\n") == 1
    assert f"data.path={path}: {error}" in result.stderr
    assert [p.suffix for p in (tmp_path / "data").iterdir()] == [".lock"]


def test_files_have_no_subset(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "docs.jsonl")
    with pytest.raises(ConfigError, match=r"data\.subset=en: local files have no"):
        open_corpus(DataConfig("hf", str(path), subset="en"))


@pytest.mark.parametrize("streaming", mostly_long(["false", "true"], "false"))
def test_a_hub_name_is_downloaded_and_gives_what_its_files_give(
    tmp_path: Path, streaming: str
) -> None:
    """Over HTTP from a stand-in; without streaming the data still works when the hub is gone."""
    local = jsonl(tmp_path / "train.jsonl")

    def tokens(url: str, path: str, folder: str) -> tuple[bytes, ...]:
        env = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "GPT_DATA": str(tmp_path / folder)}
        args = overrides("data=hf", f"data.path={path}", f"data.streaming={streaming}")
        result = run_program(*args, script="prepare", **env)
        assert result.returncode == 0, result.stderr
        assert "Retrying" not in result.stderr  # retries would take half a minute
        return tuple(file.read_bytes() for file in sorted((tmp_path / folder).rglob("*.bin")))

    with hub_server("someone/corpus", {"train.jsonl": local.read_bytes()}) as (url, asked):
        theirs = tokens(url, "someone/corpus", "theirs")
        assert asked
        asked.clear()
        ours = tokens(url, str(local), "ours")
        assert not asked  # local files need no request
        env = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path)}
        none = run_program("data=hf", "data.path=someone/else", script="prepare", **env)
    assert theirs == ours
    assert len(ours) == 2
    assert (none.returncode, none.stderr.count("\n")) == (65, 1)
    if streaming == "false":
        assert tokens(url, "someone/corpus", "again") == ours


def test_a_hub_name_without_network_fails_at_once_with_the_way_out(tmp_path: Path) -> None:
    """The address is local and refuses connections: no test uses the network."""
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    code = (
        "import time; from gpt.data.corpus import open_corpus; from gpt.config import DataConfig\n"
    )
    code += "start = time.perf_counter()\n"
    code += "try: next(open_corpus(DataConfig('hf', 'someone/something')).documents())\n"
    code += "finally: print(time.perf_counter() - start)"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )
    assert "the hub cannot be reached; give local jsonl" in result.stderr
    assert float(result.stdout) < 5  # not the 23 s of the library's retries
    shown = run_program("data=hf", "data.path=someone/something", f"run_dir={tmp_path}/run", **env)
    assert shown.returncode == 66
    assert shown.stderr.count("\n") == 1
