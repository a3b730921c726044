"""A stand-in of a Hugging Face hub: the part of its HTTP API that downloads use, on 127.0.0.1."""

import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

MAIN = "main"


@dataclass
class Repo:
    """A repository. revisions: files by branch or tag. token: what opens it, if it is gated."""

    revisions: dict[str, dict[str, bytes]]
    token: str | None = None

    def commit(self, revision: str) -> str | None:
        for name in self.revisions:
            if revision in (name, _sha1(name.encode())):
                return _sha1(name.encode())
        return None

    def files(self, revision: str) -> dict[str, bytes]:
        return next(
            files
            for name, files in self.revisions.items()
            if revision in (name, _sha1(name.encode()))
        )


@dataclass
class Hub:
    """repos: by id. asked: (method, path, Range header) of every request. sent: bytes, by file.
    cut: files, by name, of which the first answer ends after so many bytes."""

    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    cut: dict[str, int] = field(default_factory=dict)
    url: str = ""

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes],
        *,
        revision: str = MAIN,
        token: str | None = None,
    ) -> None:
        made = self.repos.setdefault(repo, Repo({}, token))
        made.revisions[revision] = dict(files)

    def add_folder(self, repo: str, folder: Path, **options) -> None:
        files = [file for file in folder.rglob("*") if file.is_file()]
        named = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
        self.add(repo, named, **options)

    @property
    def fetched(self) -> set[str]:
        """The files that were sent."""
        found = (re.search(r"/resolve/[^/]+/(.+)", p) for m, p, _ in self.asked if m == "GET")
        return {match[1] for match in found if match}


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format, *args):
            pass

        def do_HEAD(self):
            self._answer()

        def do_GET(self):
            self._answer()

        def _answer(self):
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path, self.headers.get("Range")))
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            found = api or file
            repo = hub.repos.get(found[1]) if found else None
            if found is None or repo is None:  # the hub says so of private ones too
                return self._send(401, error="RepoNotFound")
            revision = (found[3] or MAIN) if api else found[2]
            commit = repo.commit(revision)
            if commit is None:
                return self._send(404, error="RevisionNotFound")
            files = repo.files(revision)
            if api:
                listed = _tree(files) if api[2] == "tree" else _info(found[1], commit, files)
                return self._send(200, json.dumps(listed).encode())
            if repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
                status = 403 if self.headers.get("Authorization") else 401
                return self._send(status, error="GatedRepo")
            if file[3] not in files:
                return self._send(404, error="EntryNotFound", commit=commit)
            return self._send_file(file[3], files[file[3]], commit)

        def _send_file(self, name: str, content: bytes, commit: str) -> None:
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            total, tag = len(content), _sha1(content)
            start = int(part[1]) if part else 0
            if part and part[2]:
                content = content[: int(part[2]) + 1]
            self.send_response(206 if part else 200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{tag}"')
            self.send_header("Content-Length", str(len(content) - start))
            if part:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{total}")
            self.end_headers()
            if self.command == "GET":
                end = hub.cut.pop(name, len(content))
                self.wfile.write(content[start:end])
                hub.sent[name] += len(content[start:end])
                if end < len(content):
                    self.wfile.flush()
                    self.close_connection = True

        def _send(self, status, content=b"", *, error=None, commit=None):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if error:
                self.send_header("X-Error-Code", error)
            if commit:
                self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    return Handler


def _info(repo: str, commit: str, files: Mapping[str, bytes]) -> dict:
    siblings = [
        {"rfilename": name, "size": len(content), "blobId": _sha1(content)}
        for name, content in files.items()
    ]
    return {"_id": "0", "id": repo, "modelId": repo, "sha": commit, "siblings": siblings}


def _tree(files: Mapping[str, bytes]) -> list[dict]:
    return [
        {"type": "file", "path": name, "size": len(content), "oid": _sha1(content)}
        for name, content in files.items()
    ]
