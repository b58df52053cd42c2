"""A small Hugging Face hub on this machine: what its real client asks for, and what it uploads."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["COMMIT", "TOKEN", "fake_hub"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_this_test"

Files = dict[str, dict[str, bytes]]
"""By repository and name."""


@contextlib.contextmanager
def fake_hub(files: Files, *, private: tuple[str, ...] = ()) -> Iterator[str]:
    """Serve ``files``; yield the address. Those of ``private`` want :data:`TOKEN`.

    Uploads are put into ``files``.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def refuse(self, code: str, status: int = 404) -> None:
            self.answer(b"", status, X_Error_Code=code, X_Error_Message=code)

        def allowed(self, repository: str) -> bool:
            named = self.headers.get("Authorization", "") == f"Bearer {TOKEN}"
            return repository not in private or named

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            parts = path.split("/")
            if len(parts) >= 5 and parts[2] == "resolve":
                repository, name = "/".join(parts[:2]), "/".join(parts[4:])
                if repository not in files or not self.allowed(repository):
                    self.refuse("RepoNotFound", 401 if repository in files else 404)
                elif parts[3] not in ("main", COMMIT, "v1"):
                    self.refuse("RevisionNotFound")
                elif name not in files[repository]:
                    self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                else:
                    content = files[repository][name]
                    tag = hashlib.sha1(content).hexdigest()
                    self.answer(content, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)
            elif path.startswith("api/models/"):
                self.answer(json.dumps({"id": "/".join(parts[2:4]), "sha": COMMIT}).encode())
            else:
                self.refuse("EntryNotFound")

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            chunked = self.headers.get("Transfer-Encoding") == "chunked"
            body = self.chunks() if chunked else self.rfile.read(length)
            parts = self.path.partition("?")[0].strip("/").split("/")
            if not self.headers.get("Authorization", "").endswith(TOKEN):
                self.answer(b"{}", 401)
            elif parts[:3] == ["api", "repos", "create"]:
                said = json.loads(body)
                name = "/".join(filter(None, (said.get("organization"), said["name"])))
                name = name if "/" in name else f"me/{name}"
                files.setdefault(name, {})
                url = f"http://{self.headers['Host']}/{name}"
                self.answer(json.dumps({"url": url, "name": name, "id": "1"}).encode())
            elif "preupload" in parts:
                asked = [file["path"] for file in json.loads(body)["files"]]
                modes = [
                    {"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in asked
                ]
                self.answer(json.dumps({"files": modes}).encode())
            elif "commit" in parts:
                repository = "/".join(parts[2:4])
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        files[repository][entry["value"]["path"]] = content
                url = f"http://{self.headers['Host']}/{repository}/commit/{COMMIT}"
                self.answer(json.dumps({"commitUrl": url, "commitOid": COMMIT}).encode())
            else:
                self.answer(b"{}")

        def chunks(self) -> bytes:
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
