"""A Hub on the loopback: what huggingface_hub asks for when it pushes and pulls one model repository."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_loopback"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The server's state, and the knobs of a test.

    Attributes:
        files: what has been committed, by path.
        private: of the repository; None while there is none.
        role: of the token, `write` or `read`.
        forbid: part of a path whose requests are answered 403.
        vanish: part of a path; from the first request for it on, every connection is dropped.
        large: suffix of the files that go through large-file storage.
        asked: method and path of every request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool | None = None
    role: str = "write"
    forbid: str | None = None
    vanish: str | None = None
    large: str | None = None
    asked: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    gone: bool = False
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        if not headers or "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _handle(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        if hub.gone or (hub.vanish is not None and hub.vanish in path):
            hub.gone = True
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.forbid is not None and hub.forbid in path:
            self._answer(403, {"error": "you shall not pass"}, {"X-Error-Message": "not yours"})
        elif self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
            self._answer(401, {"error": "Invalid username or password."})
        elif self.command in ("GET", "HEAD"):
            self._read(path)
        else:
            self._write(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read(self, path: str) -> None:
        hub = self.hub
        name = path.partition("/resolve/")[2].partition("/")[2]
        if path == "/api/whoami-v2":
            auth = {"type": "access_token", "accessToken": {"displayName": "t", "role": hub.role}}
            if self.headers.get("Authorization") is None:
                self._answer(401, {"error": "no token"})
            else:
                self._answer(
                    200, {"type": "user", "name": "ann", "orgs": [{"name": "lab"}], "auth": auth}
                )
        elif "/tree/" in path:  # of folders, and a repository here has none
            self._answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
        elif path.startswith("/api/models/") and hub.private is not None:
            siblings = [{"rfilename": n} for n in hub.files]
            self._answer(
                200,
                {"id": "ann/tiny", "sha": COMMIT, "private": hub.private, "siblings": siblings},
            )
        elif name in hub.files:
            data = hub.files[name]
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self._answer(
                200,
                data,
                {"ETag": etag, "X-Repo-Commit": COMMIT, "Content-Length": str(len(data))},
            )
        else:
            code = "RepoNotFound" if hub.private is None else "EntryNotFound"
            self._answer(404, {"error": "not found"}, {"X-Error-Code": code})

    def _write(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            if hub.private is None:
                asked = json.loads(body)
                hub.private = bool(asked.get("private") or asked.get("visibility") == "private")
                self._answer(200, {"url": f"{hub.url}/ann/tiny", "name": "ann/tiny"})
            else:
                self._answer(409, {"error": "exists", "url": f"{hub.url}/ann/tiny"})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs"
                    if hub.large and f["path"].endswith(hub.large)
                    else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/blob/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif path.startswith("/blob/"):
            hub.blobs[path.removeprefix("/blob/")] = body
            self._answer(200)
        elif "/commit/" in path:
            self._commit(body)
        else:
            self._answer(404, {"error": f"nothing at {path}"})

    def _commit(self, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.blobs[value["oid"]]
        self._answer(
            200,
            {
                "success": True,
                "commitOid": COMMIT,
                "commitUrl": f"{self.hub.url}/ann/tiny/commit/0",
            },
        )


@contextmanager
def serving(**knobs: Any) -> Iterator[Hub]:
    """A hub that listens while open."""
    hub = Hub(**knobs)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_at(patch: pytest.MonkeyPatch, url: str, cache: str, token: str | None = TOKEN) -> None:
    """Let the real client talk to `url` with `token`, as HF_ENDPOINT and HF_TOKEN would.

    The client reads its environment once, at import; this process may have imported it already.
    """
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    for module in (constants, hf_api, file_download):
        if hasattr(module, "ENDPOINT"):
            patch.setattr(module, "ENDPOINT", url)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_CACHE", cache)
    patch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/token")
    patch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    patch.setattr(hf_api.api, "endpoint", url)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
    patch.setattr(_http.time, "sleep", lambda _: None)  # between the client's retries
