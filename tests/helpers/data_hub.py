"""A hub on the loopback interface: the endpoints that datasets asks for dataset repositories."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

from tests.helpers.loopback import Handler, serving

COMMIT = "a" * 40


@contextmanager
def serve(repositories: dict[str, dict[str, bytes]]) -> Iterator[str]:
    """Serves the files of repositories; gives the hub's address."""
    with serving(type("OfThese", (_Handler,), {"repositories": repositories})) as address:
        yield address


class _Handler(Handler):
    repositories: dict[str, dict[str, bytes]]

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        for name, files in self.repositories.items():
            if re.fullmatch(rf"/api/datasets/{name}(/revision/[^/]+)?", path):
                siblings = [{"rfilename": file} for file in files]
                return self.json({"id": name, "sha": COMMIT, "tags": [], "siblings": siblings})
            if re.fullmatch(rf"/api/datasets/{name}/tree/[^/]+(/.*)?", path):
                digests = {file: hashlib.sha1(data).hexdigest() for file, data in files.items()}
                return self.json(
                    [{"type": "file", "path": f, "size": len(files[f]), "oid": oid} for f, oid in digests.items()]
                )
            if match := re.fullmatch(rf"/datasets/{name}/resolve/[^/]+/(.+)", path):
                return self._file(files.get(match[1]))
        return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def _file(self, data: bytes | None) -> None:
        if data is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return self.answer(200, data, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="none")
