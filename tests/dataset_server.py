"""A Hub on the loopback: what the `datasets` library asks for when it reads a dataset repository."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Server:
    """Datasets by (id, revision), each a mapping of paths to contents; and what was asked for."""

    repositories: dict[tuple[str, str], dict[str, bytes]]
    url: str = ""
    asked: list[str] = field(default_factory=list)

    def downloads(self) -> list[str]:
        """Paths of the data files that were sent."""
        return [
            line.split("/resolve/")[1].split("/", 1)[1]
            for line in self.asked
            if line.startswith("GET") and "/resolve/" in line and not line.endswith(".md")
        ]


def commit(revision: str) -> str:
    """The hash that stands for `revision`; a hash stands for itself."""
    known = len(revision) == 40
    return revision if known else hashlib.sha1(revision.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server_state: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not here"})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        for (name, known), files in self.server_state.repositories.items():
            if name == repo and revision in (known, commit(known)):
                return files
        return None

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path).replace("refs/convert/parquet", "refs%convert")
        self.server_state.asked.append(f"{self.command} {path}")
        parts = [p.replace("refs%convert", "refs/convert/parquet") for p in path.split("/")[1:]]
        if parts[:2] == ["api", "datasets"]:
            self._api("/".join(parts[2:4]), parts[4:], body)
        elif parts[0] == "datasets" and parts[3:4] == ["resolve"]:
            self._resolve("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
        else:
            self._send(200, b"", {})

    def _api(self, repo: str, rest: list[str], body: bytes) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        files = self._files(repo, revision)
        if files is None:
            known = any(name == repo for name, _ in self.server_state.repositories)
            return self._missing("RevisionNotFound" if known else "RepoNotFound")
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self._json(
                {"id": repo, "sha": commit(revision), "private": False, "siblings": siblings,
                 "tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False}
            )  # fmt: skip
        if rest[0] == "tree":
            return self._json(self._tree(files, "/".join(rest[2:])))
        if rest[0] == "paths-info":
            wanted = json.loads(body)["paths"]
            return self._json([e for w in wanted for e in self._entry(files, w)])
        return self._missing("EntryNotFound")

    def _entry(self, files: dict[str, bytes], path: str) -> list[dict[str, Any]]:
        if path in files:
            oid = hashlib.sha1(files[path]).hexdigest()
            return [{"type": "file", "path": path, "size": len(files[path]), "oid": oid}]
        if any(name.startswith(f"{path}/") for name in files):
            return [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40}]
        return []

    def _tree(self, files: dict[str, bytes], folder: str) -> list[dict[str, Any]]:
        """Everything below `folder`, whether or not the client asked for the deeper levels."""
        inside = [path for path in files if not folder or path.startswith(f"{folder}/")]
        folders = {p.rsplit("/", d)[0] for p in inside for d in range(1, p.count("/") + 1)}
        below = sorted(f for f in folders if f != folder and f.startswith(folder))
        return [entry for path in [*below, *inside] for entry in self._entry(files, path)]

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        files = self._files(repo, revision)
        if files is None:
            return self._missing("RepoNotFound")
        if path not in files:
            return self._missing("EntryNotFound")
        data = files[path]
        etag = hashlib.sha1(data).hexdigest()
        return self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit(revision)})

    do_GET = do_HEAD = do_POST = _handle


@contextmanager
def serve(repositories: dict[tuple[str, str], dict[str, bytes]]) -> Iterator[Server]:
    """A running server on a free port of the loopback."""
    state = Server(repositories)
    handler = type("Handler", (_Handler,), {"server_state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
