"""A stand-in for the part of the hub that takes uploads: as much of its protocol as huggingface_hub asks for without xet."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.pipeline.hub_server import serving

TOKEN = "hf_c0ffee5ec4e7"


class UploadHub:
    """repos: files by path of each repository, once they are committed. objects: large files that have arrived, by digest.
    visibility: of each repository. received: bytes of large files received, one number for each. num_until_away: large files
    that are taken before the server answers with 500; None for no end."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str | None] = {}
        self.objects: dict[str, bytes] = {}
        self.received: list[int] = []
        self.num_until_away: int | None = None
        self.url = ""


def _handler(hub: UploadHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _send(self, status: int, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def _body(self) -> bytes:
            if (length := self.headers.get("Content-Length")) is not None:
                return self.rfile.read(int(length))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def do_PUT(self) -> None:
            data = self._body()
            if hub.num_until_away is not None and len(hub.received) >= hub.num_until_away:
                self._send(400, {"error": "away"})
                return
            digest = self.path.removeprefix("/objects/")
            assert hashlib.sha256(data).hexdigest() == digest
            hub.objects[digest] = data
            hub.received.append(len(data))
            self._send(200, {})

        def do_POST(self) -> None:
            data, path = self._body(), self.path.split("?")[0]
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._send(401, {"error": "log in"})
            elif path == "/api/repos/create":
                asked = json.loads(data)
                name = f"{asked['organization']}/{asked['name']}"
                if name in hub.repos:
                    self._send(409, {"error": "exists", "url": f"{hub.url}/{name}"})
                    return
                hub.repos[name], hub.visibility[name] = {}, asked.get("visibility")
                self._send(200, {"url": f"{hub.url}/{name}", "id": name})
            elif path == "/api/validate-yaml":
                self._send(200, {"errors": [], "warnings": []})
            elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
                files = json.loads(data)["files"]
                modes = ["lfs" if one["path"].endswith(".safetensors") else "regular" for one in files]
                answers = [
                    {"path": one["path"], "uploadMode": mode, "shouldIgnore": False}
                    for one, mode in zip(files, modes, strict=True)
                ]
                self._send(200, {"files": answers})
            elif path.endswith(".git/info/lfs/objects/batch"):
                self._send(200, {"transfer": "basic", "objects": [self._object(one) for one in json.loads(data)["objects"]]})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
                self._commit(match[1], data)
            else:
                self._send(404, {"error": path})

        def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
            if asked["oid"] in hub.objects:
                return asked
            return {**asked, "actions": {"upload": {"href": f"{hub.url}/objects/{asked['oid']}", "header": {}}}}

        def _commit(self, name: str, data: bytes) -> None:
            for line in data.splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    hub.repos[name][one["value"]["path"]] = base64.b64decode(one["value"]["content"])
                elif one["key"] == "lfsFile":
                    hub.repos[name][one["value"]["path"]] = hub.objects[one["value"]["oid"]]
            self._send(200, {"commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})

    return Handler


@contextmanager
def serve_uploads(hub: UploadHub) -> Iterator[UploadHub]:
    """Serve it on a free port of the loopback interface."""
    with serving(_handler(hub)) as hub.url:
        yield hub
