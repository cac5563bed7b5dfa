"""`data=hf` with a name on the hub: a stand-in over HTTP, and no network at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.configs import mostly_long, overrides
from tests.tools.hub_server import hub_server
from tests.tools.made_files import jsonl
from tests.tools.programs import run_program


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
