"""A stand-in for wandb's server: what its client asks over HTTP, answered from memory.

It knows runs (configuration, tags, group, history by line, summary) and accepts any file. It checks
no API key and writes nothing to disk. Any unknown request is answered with an empty object.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OWNER = {"id": "1", "name": "someone"}


@dataclass
class Run:
    """One run as the server stores it. history: its lines, in order of offset."""

    name: str
    told: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    finished: bool = False

    def bucket(self) -> dict[str, Any]:
        return {
            "id": self.name, "name": self.name, "displayName": self.told.get("displayName"),
            "config": self.told.get("config"), "summaryMetrics": json.dumps(self.summary),
            "historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
            "eventsTail": "[]", "tags": self.told.get("tags") or [],
            "wandbConfig": json.dumps({"t": 1}),  # without it a run counts as not begun
            "project": {"id": "1", "name": self.told.get("project"), "entity": OWNER},
        }  # fmt: skip


@dataclass
class Server:
    url: str
    runs: dict[str, Run] = field(default_factory=dict)

    def graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        name, given = request["operationName"], request.get("variables", {})
        if name == "Viewer":
            return {
                "viewer": {"id": "1", "entity": "someone", "username": "someone", "flags": "{}"}
            }
        if name == "RunResumeStatus":
            run = self.runs.get(given["name"])
            return {"model": {"id": "1", "name": given["project"], "entity": OWNER,
                              "bucket": run and run.bucket()}}  # fmt: skip
        if name == "UpsertBucket":
            inserted = given["name"] not in self.runs
            run = self.runs.setdefault(given["name"], Run(given["name"], {}))
            run.told |= {key: value for key, value in given.items() if value is not None}
            return {"upsertBucket": {"bucket": run.bucket(), "inserted": inserted}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{given['run']}/{file}"}
                     for file in given["files"]]  # fmt: skip
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        if "query ArtifactType(" in request["query"]:
            return {"project": {"artifact": None}}  # no artifact of this name yet
        if name == "CreateArtifact":  # "committed": it needs no upload beyond the run's file
            one = {"id": "1", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": one}}
        return {}

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        run = self.runs[name]
        for file, chunk in sent.get("files", {}).items():
            rows = [json.loads(line) for line in chunk["content"]]
            if file == "wandb-history.jsonl":
                assert chunk["offset"] <= len(run.history), "a gap in the history"
                run.history[chunk["offset"] :] = rows
            elif file == "wandb-summary.json":
                run.summary = rows[-1]
        run.finished = bool(sent.get("complete"))


@contextmanager
def wandb_server() -> Iterator[Server]:
    """Run a server, which answers at its `url`, until the context ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # its client was killed
                super().handle()

        def content(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

        def answer(self, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = self.content()
            if self.path == "/graphql":
                self.answer({"data": state.graphql(json.loads(body))})
            elif self.path.endswith("/file_stream"):
                state.stream(self.path.split("/")[-2], json.loads(body))
                self.answer({})
            else:
                self.answer({})

        def do_PUT(self) -> None:
            _, _, run, file = self.path.split("/", 3)
            state.runs[run].files[file] = self.content()
            self.answer({})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Server(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
