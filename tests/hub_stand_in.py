"""A model hub on this machine: what huggingface_hub asks, answered from folders."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The models, and what happens to a request for weights."""

    def __init__(self):
        self.models: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.fault = ""
        self.ranges: list[str | None] = []
        self.requests: list[str] = []
        self.address = ""
        self.closing = threading.Event()


@contextmanager
def running(hub: Hub):
    """Answers inside the `with` block at `hub.address`."""
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(path)
            if path == "/":
                return self.answer(200, b"")
            asked = (re.fullmatch(r"/api/models/(.+?)/(revision|tree)/([^/]+)", path)
                     or re.fullmatch(r"/(.+?)/(resolve)/([^/]+)/(.+)", path))
            if not asked or asked[1] not in hub.models:
                return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            folder, action, revision = hub.models[asked[1]], asked[2], asked[3]
            if revision not in ("main", COMMIT):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            if action == "revision":
                return self.answer(200, json.dumps({
                    "id": asked[1], "sha": COMMIT, "private": False, "tags": [], "downloads": 0,
                    "siblings": [{"rfilename": file.relative_to(folder).as_posix()}
                                 for file in files]}).encode())
            if action == "tree":
                return self.answer(200, json.dumps([
                    {"type": "file", "path": file.relative_to(folder).as_posix(),
                     "size": file.stat().st_size, "oid": etag(file)} for file in files]).encode())
            if asked[1] in hub.gated:
                return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            file = folder / asked[4]
            if not file.is_file():
                return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return self.send(file)

        do_HEAD = do_GET

        def send(self, file: Path):
            content, start = file.read_bytes(), 0
            weights = file.suffix == ".safetensors" and self.command == "GET"
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(file)}"', "Accept-Ranges": "bytes"}
            if weights:
                hub.ranges.append(self.headers.get("Range"))
                if hub.fault == "drop":
                    return self.hang_up()
            if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                start = int(found[1])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if not weights or hub.fault not in ("cut", "stall"):
                return self.answer(206 if start else 200, content[start:], headers)
            stall = hub.fault == "stall"
            hub.fault = "" if hub.fault == "cut" else hub.fault
            self.begin(206 if start else 200, len(content) - start, headers)
            self.wfile.write(content[start:start + (len(content) - start) // 2])
            self.wfile.flush()
            if stall:
                hub.closing.wait()
            return self.hang_up()

        def begin(self, status: int, length: int, headers: dict):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def answer(self, status: int, content: bytes, headers: dict | None = None):
            self.begin(status, len(content), headers or {})
            if self.command == "GET":
                self.wfile.write(content)

        def hang_up(self):
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()


def etag(file: Path) -> str:
    """Like the hub's: sha256 of a large file, sha1 of a small one."""
    kind = hashlib.sha256 if file.suffix == ".safetensors" else hashlib.sha1
    return kind(file.read_bytes()).hexdigest()
