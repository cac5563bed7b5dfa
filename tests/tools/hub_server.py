"""A stand-in for the hub: one data set or model, answered as `huggingface_hub` asks for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "1" * 40


@contextmanager
def hub_server(
    name: str, files: Mapping[str, bytes], kind: str = "datasets"
) -> Iterator[tuple[str, list[str]]]:
    """Serve `name`, of `datasets` or `models`, with these files; yield the address and the paths
    that are asked for."""
    asked: list[str] = []
    info = {"_id": "1", "id": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0,
            "likes": 0, "siblings": [{"rfilename": path} for path in files]}  # fmt: skip
    tree = [
        {"type": "file", "path": path, "size": len(content), "oid": sha1(content).hexdigest()}
        for path, content in files.items()
    ]
    facts, root = f"/api/{kind}/{name}", f"/datasets/{name}" if kind == "datasets" else f"/{name}"
    pages = {
        facts: info,
        f"{facts}/revision/main": info,
        f"{facts}/revision/{COMMIT}": info,
        f"{facts}/tree/{COMMIT}": tree,
    }
    answers = {path: json.dumps(page).encode() for path, page in pages.items()}
    answers |= {f"{root}/resolve/{COMMIT}/{path}": file for path, file in files.items()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            body = answers.get(path, b"")
            self.send_response(200 if path in answers else 404)
            if path not in answers:
                known = path.startswith((f"{root}/", facts))
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("ETag", f'"{sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
