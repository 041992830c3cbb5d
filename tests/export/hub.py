"""A local server that implements the repository API of the Hugging Face hub."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

LARGE = (".safetensors", ".onnx")


@dataclass
class Hub:
    """The repositories, and the requests to the server.

    Attributes:
        url: its address.
        files: content by path, for each repository.
        public: public repositories.
        blobs: large files by SHA-256, with or without a commit.
        sent: the SHA-256 of each uploaded large file, in order.
        refused: HTTP status for the upload of a large file, by SHA-256.
        forbids: HTTP status for creating repositories.
    """

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    public: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    forbids: int = 0
    commits: int = 0

    @property
    def commit(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()

    def fill(self, name: str, folder: Path) -> None:
        """Create a repository with the files of a folder."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        self.files[name] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
        self.commits += 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *given: Any) -> None: ...

    def do_GET(self) -> None:
        self._respond(self._get(unquote(urlparse(self.path).path)))

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        oid, body = self.path.rpartition("/")[2], self._body()
        if oid in self.hub.refused:
            return self._respond((self.hub.refused[oid], {}))
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.sent.append(oid)
        self.hub.blobs[oid] = body
        self._respond((200, {}))

    def do_POST(self) -> None:
        path, body, hub = urlparse(self.path).path, self._body(), self.hub
        if path == "/api/validate-yaml":
            return self._respond((200, {"errors": [], "warnings": []}))
        if path == "/api/repos/create":
            return self._respond(self._create(json.loads(body)))
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3]).removesuffix(".git")
        if "/preupload/" in path:
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in json.loads(body)["files"]
            ]
            return self._respond((200, {"files": files}))
        if path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                if one["oid"] not in hub.blobs:
                    upload = {"href": f"{hub.url}/blobs/{one['oid']}"}
                    one["actions"] = {"upload": upload}
            return self._respond((200, {"objects": objects}))
        assert "/commit/" in path
        self._commit(hub.files[name], [json.loads(line) for line in body.splitlines()])
        hub.commits += 1
        said = {"commitUrl": f"{hub.url}/{name}/commit/{hub.commit}", "commitOid": hub.commit}
        return self._respond((200, said))

    def _create(self, said: dict[str, Any]) -> tuple[int, Any]:
        name, hub = f"{said['organization']}/{said['name']}", self.hub
        if hub.forbids:
            return hub.forbids, {"error": "no"}
        url = {"url": f"{hub.url}/{name}"}
        if name in hub.files:
            return 409, url
        hub.files[name] = {".gitattributes": b""}
        private = said.get("visibility") == "private" or said.get("private")
        hub.public |= set() if private else {name}
        return 200, url

    def _commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]

    def _get(self, path: str) -> tuple[int, Any]:
        hub = self.hub
        parts = path.removeprefix("/api/models").split("/")[1:]
        name = "/".join(parts[:2])
        if name not in hub.files:
            return 404, {"error": "Repository not found"}
        files = hub.files[name]
        if path.startswith("/api/") and "tree" in parts:
            return 200, [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
            ]
        if path.startswith("/api/"):
            said = {"id": name, "private": name not in hub.public, "sha": hub.commit}
            return 200, said | {"siblings": [{"rfilename": p} for p in files]}
        content = files.get("/".join(parts[4:]))
        return (200, content) if content is not None else (404, None)

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _respond(self, answer: tuple[int, Any]) -> None:
        status, content = answer
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        if status == 404:
            missing = "EntryNotFound" if content is None else "RepoNotFound"
            self.send_header("X-Error-Code", missing)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve() -> Iterator[Hub]:
    """Run the server within a context."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make huggingface_hub use the server, as HF_ENDPOINT does at the start of a process."""
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_CACHE": str(cache),
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
