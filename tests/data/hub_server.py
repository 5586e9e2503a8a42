"""A hub on the loopback interface: the endpoints that datasets asks for dataset repositories."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "a" * 40


@contextmanager
def serve(repositories: dict[str, dict[str, bytes]]) -> Iterator[str]:
    """Serves the files of repositories; gives the hub's address."""
    handler = type("Handler", (_Handler,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    repositories: dict[str, dict[str, bytes]]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        for name, files in self.repositories.items():
            if re.fullmatch(rf"/api/datasets/{name}(/revision/[^/]+)?", path):
                siblings = [{"rfilename": file} for file in files]
                return self._json({"id": name, "sha": COMMIT, "tags": [], "siblings": siblings})
            if re.fullmatch(rf"/api/datasets/{name}/tree/[^/]+(/.*)?", path):
                digests = {file: hashlib.sha1(data).hexdigest() for file, data in files.items()}
                return self._json(
                    [{"type": "file", "path": f, "size": len(files[f]), "oid": oid} for f, oid in digests.items()]
                )
            if match := re.fullmatch(rf"/datasets/{name}/resolve/[^/]+/(.+)", path):
                return self._file(files.get(match[1]))
        return self._answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def _file(self, data: bytes | None) -> None:
        if data is None:
            return self._answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return self._answer(200, data, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="none")
