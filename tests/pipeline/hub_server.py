"""A stand-in for the hub on this machine: as much of its protocol as huggingface_hub asks for."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Models and datasets by name, each a folder; `token`: what a request must bring, if anything; `requests`: what was asked
    for; `commit`: what `main` means now, of any content."""

    def __init__(self, models: dict[str, Path], token: str | None = None, datasets: dict[str, Path] | None = None) -> None:
        self.models, self.token, self.datasets, self.commit = models, token, datasets or {}, COMMIT
        self.requests: list[str] = []
        self.url = ""

    def files(self, folder: Path) -> dict[str, Path]:
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def downloads(self) -> list[str]:
        """Files whose content was sent."""
        return [
            re.split("/resolve/[^/]+/", unquote(line), maxsplit=1)[1]
            for line in self.requests
            if line.startswith("GET") and "/resolve/" in line
        ]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(has_body=False)

        def do_GET(self) -> None:
            self._answer(has_body=True)

        def _send(self, status: int, body: bytes, has_body: bool, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if has_body:
                self.wfile.write(body)

        def _answer(self, has_body: bool) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            path = self.path.split("?")[0]
            if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._send(401, b"{}", has_body, X_Error_Code="GatedRepo", X_Error_Message="log in")
                return
            folders = hub.datasets if path.startswith(("/api/datasets/", "/datasets/")) else hub.models
            asked = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
            tree = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/([^/]+)", path)
            file = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", unquote(path))
            match = asked or tree or file
            if match is None or match[1] not in folders or match[2] not in (None, "main", hub.commit):
                code = "RevisionNotFound" if match is not None and match[1] in folders else "RepoNotFound"
                self._send(404, b"{}", has_body, X_Error_Code=code)
                return
            files = hub.files(folders[match[1]])
            if asked:
                siblings = [{"rfilename": name, "size": p.stat().st_size} for name, p in files.items()]
                self._json({"id": match[1], "modelId": match[1], "sha": hub.commit, "siblings": siblings}, has_body)
            elif tree:
                self._json(
                    [{"type": "file", "path": name, "size": p.stat().st_size, "oid": "0" * 40} for name, p in files.items()],
                    has_body,
                )
            elif file is not None and file[3] in files:
                self._file(files[file[3]].read_bytes(), has_body)
            else:
                self._send(404, b"{}", has_body, X_Error_Code="EntryNotFound")

        def _json(self, value: Any, has_body: bool) -> None:
            self._send(200, json.dumps(value).encode(), has_body, Content_Type="application/json")

        def _file(self, data: bytes, has_body: bool) -> None:
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if asked:
                first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                self._send(206, data[first : last + 1], has_body, **headers)
            else:
                self._send(200, data, has_body, **headers)

    return Handler


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on a free port of the loopback interface: the server's URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve it on a free port of the loopback interface."""
    with serving(_handler(hub)) as hub.url:
        yield hub
