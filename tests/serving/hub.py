"""A small hub on loopback, in the layout of the real one: listings, commits, resolve with Range, faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from models.tiny_scenes import BUNDLES

COMMIT = hashlib.sha1(b"a commit of the tests' hub").hexdigest()
LARGE = (".onnx", ".onnx_data", ".safetensors")  # stored with LFS at the hub: listed with a sha256


def published_files(**more: bytes) -> dict[str, bytes]:
    """tiny-scenes laid out as a published ONNX repository: fp32, and the same graphs under the suffixes of int4."""
    folder = BUNDLES["tiny-scenes@fp32"]
    texts = [path for path in folder.iterdir() if path.is_file() and path.name != "manifest.json"]
    files = {path.name: path.read_bytes() for path in texts}
    for graph, suffix in (("vision_encoder", ""), ("embed_tokens", "_fp16"), ("decoder_model_merged", "_q4")):
        content = (folder / f"onnx/{graph}.onnx").read_bytes()
        files |= {f"onnx/{graph}.onnx": content, f"onnx/{graph}{suffix}.onnx": content}
    return files | {"README.md": b"# a model", "pytorch_model.bin": b"\x80\x02never fetched"} | more


class Hub:
    """Repositories, what was asked of them, and faults: each is a plain attribute that a test sets."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.headers: list[dict[str, str]] = []
        self.sent: Counter[str] = Counter()  # body bytes by file
        self.cut_after: int | None = None  # bytes of a large file's body, then the connection ends; once a transfer
        self.served_instead: dict[str, bytes] = {}  # file: what really comes, under the old name and hash
        self.listed_bytes: dict[str, int] = {}  # file: the size that the listing claims
        self.hold = threading.Event()  # clear: large files stop in the middle until it is set
        self.hold.set()

    def listing(self, repository: str) -> dict[str, Any]:
        siblings = []
        for name, content in self.repositories[repository].items():
            size = self.listed_bytes.get(name, len(content))
            entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": git_digest(content)}
            if name.endswith(LARGE):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
            siblings.append(entry)
        return {
            "id": repository,
            "modelId": repository,
            "sha": COMMIT,
            "siblings": siblings,
            "tags": [],
            "private": False,
        }


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        self.hub.headers.append({name.lower(): value for name, value in self.headers.items()})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._listing(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path):
            self._file(match[1], match[3], with_body=with_body)
        else:
            self._error("EntryNotFound")

    def _listing(self, repository: str, revision: str) -> None:
        if repository not in self.hub.repositories:
            self._error("RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._error("RevisionNotFound")
        else:
            body = json.dumps(self.hub.listing(repository)).encode()
            self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
            self.wfile.write(body)

    def _file(self, repository: str, name: str, *, with_body: bool) -> None:
        content = self.hub.repositories[repository].get(name)
        if content is None:
            self._error("EntryNotFound")
            return
        digest = hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_digest(content)
        content = self.hub.served_instead.get(name, content)
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if name.endswith(LARGE):
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        rest = content[start:]
        self._head(206 if asked else 200, headers | {"Content-Length": str(len(rest))})
        if with_body:
            self._send(name, rest)

    def _send(self, name: str, content: bytes) -> None:
        end = len(content)
        if name.endswith(LARGE) and self.hub.cut_after is not None:
            end = min(end, self.hub.cut_after)
        half = end // 2
        for piece in (content[:half], content[half:end]):
            self.wfile.write(piece)
            self.wfile.flush()
            self.hub.sent[name] += len(piece)
            if name.endswith(LARGE):
                self.hub.hold.wait(timeout=60)
        if end < len(content):
            self.close_connection = True

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _error(self, code: str) -> None:
        self._head(404, {"X-Error-Code": code, "Content-Length": "0"})


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of loopback."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub = handler.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.hold.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def tree(folder: Path) -> set[str]:
    """Every file below a folder, relative."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
