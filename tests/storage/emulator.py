"""Cloud Storage on 127.0.0.1: gcp-storage-emulator, with what tensorstore and ArrayRecord need and
it lacks: generations in answers and as conditions, ranges from the end, several connections.
"""

import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

from taca_jax.storage.places import filesystem

Seen = Callable[[str, str, str], None]
"""Is told of a request before it is answered: its method, the bucket and the object, each maybe
empty."""


@dataclass
class Emulator:
    """A server of buckets in memory. asked: (method, object) of every request. seen: see `Seen`.
    refused: the status of all answers, if they are to be none."""

    storage: Storage
    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    seen: Seen | None = None
    refused: int | None = None

    @property
    def environment(self) -> Mapping[str, str]:
        """What makes gcsfs, tensorstore and ArrayRecord use this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google what kind a bucket is
        }

    def add_bucket(self, name: str) -> None:
        buckets.create_bucket(name, self.storage)

    def names(self, folder: str = "") -> list[str]:
        """The names of all objects in `bucket`, or in a folder of it."""
        return sorted(n for n in self.storage.objects.get("bucket", {}) if n.startswith(folder))

    def add_folder(self, folder: Path, to: str) -> None:
        """Copies a local folder into the bucket `bucket`."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.write(f"{to}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    def write(self, name: str, content: bytes) -> None:
        """Writes an object of the bucket `bucket`."""
        filesystem().pipe_file(f"gs://bucket/{name}", content)

    def read(self, name: str) -> bytes:
        return self.storage.get_file("bucket", name)


@contextlib.contextmanager
def serving() -> Iterator[Emulator]:
    emulator = Emulator(Storage(use_memory_fs=True))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, emulator, threading.RLock()))
    server.daemon_threads = True
    emulator.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield emulator
    finally:
        server.shutdown()
        server.server_close()


class _Handler(RequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, emulator: Emulator, lock: threading.RLock, *args):
        self._emulator = emulator
        self._lock = lock
        self._generation = 0
        super().__init__(emulator.storage, *args)

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):  # of a process that was killed
            super().handle_one_request()

    def do_GET(self) -> None:
        self._answer(super().do_GET)

    def do_POST(self) -> None:
        self._answer(super().do_POST)

    def do_DELETE(self) -> None:
        self._answer(super().do_DELETE)

    def do_PUT(self) -> None:
        self._answer(super().do_PUT)

    def do_PATCH(self) -> None:
        self._answer(super().do_PATCH)

    def _answer(self, answer: Callable[[], None]) -> None:
        connection, body = self.rfile, self._body()
        self.rfile = io.BytesIO(body)
        try:
            self._answer_to(body, answer)
        finally:
            self.rfile = connection

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer_to(self, body: bytes, answer: Callable[[], None]) -> None:
        bucket, name, query = self._asked()
        if query.get("uploadType") == ["multipart"]:
            name = json.loads(body[body.index(b"{") : body.index(b"}") + 1])["name"]
        self._emulator.asked.append((self.command, name))
        if self._emulator.seen is not None:
            self._emulator.seen(self.command, bucket, name)
        if self._emulator.refused is not None:
            self._refuse(self._emulator.refused, "Refused")
            return
        with self._lock:
            try:
                found = self._emulator.storage.get_file_obj(bucket, name)
            except NotFound:
                found = {"generation": "0", "size": "0"}
            generation = self._generation = int(found["generation"])
            wanted = query.get("ifGenerationMatch")
            unwanted = query.get("ifGenerationNotMatch")
            if wanted is not None and int(wanted[0]) != generation:
                self._refuse(412, "Precondition Failed")
            elif unwanted is not None and int(unwanted[0]) == generation:
                self._refuse(304, "Not Modified")
            else:
                self._count_from_the_start(int(found["size"]))
                answer()

    def _asked(self) -> tuple[str, str, dict[str, list[str]]]:
        """The bucket, the object and the query of this request."""
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        path = parts.path
        for prefix in ("/upload", "/download"):
            path = path.removeprefix(prefix)
        path = path.removeprefix("/storage/v1")
        if path.startswith("/b/"):
            bucket, _, rest = path.removeprefix("/b/").partition("/o")
            return bucket, unquote(rest.removeprefix("/")) or query.get("name", [""])[0], query
        bucket, _, name = path.removeprefix("/").partition("/")
        return bucket, unquote(name), query

    def _refuse(self, status: int, reason: str) -> None:
        self.send_response(status, reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _count_from_the_start(self, size: int) -> None:
        """Rewrites `Range: bytes=-N`, the last N bytes, as the emulator reads ranges."""
        asked = self.headers.get("Range") or ""
        if asked.startswith("bytes=-"):
            last = int(asked.removeprefix("bytes=-"))
            self.headers.replace_header("Range", f"bytes={max(0, size - last)}-")

    def end_headers(self) -> None:
        if self._generation and self.command == "GET":
            self.send_header("x-goog-generation", str(self._generation))
            self.send_header("x-goog-metageneration", "1")
            self.send_header("x-goog-stored-content-encoding", "identity")
        super().end_headers()
