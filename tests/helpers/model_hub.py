"""A hub on the loopback interface: the endpoints that huggingface_hub asks for one or more models."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote

from tests.helpers.loopback import Handler, serving

Files = Mapping[str, bytes]


@dataclass
class Hub:
    """`models` maps an id to its revisions, and those to files. `private` and `gated` ids need the token."""

    models: dict[str, dict[str, Files]]
    private: tuple[str, ...] = ()
    gated: tuple[str, ...] = ()
    token: str = "hf_secret"
    url: str = ""
    requests: list[str] = field(default_factory=list)

    def commit(self, model: str, revision: str) -> str | None:
        """The commit of a branch (or of a commit's own name); None where there is none."""
        for name, files in self.models[model].items():
            text = repr((model, name, sorted(files.items())))
            commit = hashlib.sha1(text.encode()).hexdigest()
            if revision in (name, commit):
                return commit
        return None

    def files(self, model: str, commit: str) -> Files:
        return next(files for name, files in self.models[model].items() if self.commit(model, name) == commit)


class _Handler(Handler):
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        self.hub.requests.append(f"{self.command} {unquote(self.path)}")

    def _refuse(self, status: int, code: str) -> None:
        message = {"RepoNotFound": "Repository not found", "RevisionNotFound": "Invalid rev id"}.get(code, code)
        self.answer(status, json.dumps({"error": message}).encode(), X_Error_Code=code, X_Error_Message=message)

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        patterns = {
            "info": r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?",
            "tree": r"/api/models/([^/]+/[^/]+)/tree/([^/]+)",
            "file": r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)",
        }
        for kind, pattern in patterns.items():
            if match := re.fullmatch(pattern, path):
                return self._model(kind, *match.groups())
        return self.answer(404)

    def _model(self, kind: str, model: str, revision: str | None, file: str = "") -> None:
        hub = self.hub
        entitled = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if model not in hub.models or (model in hub.private and not entitled):
            return self._refuse(401 if not entitled else 404, "RepoNotFound")
        commit = hub.commit(model, revision or "main")
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        files = hub.files(model, commit)
        if kind == "info":  # the hub tells everybody of a gated model, but not its files' contents
            siblings = [{"rfilename": name} for name in files]
            return self.json({"id": model, "modelId": model, "sha": commit, "siblings": siblings})
        if kind == "tree":
            return self.json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
            )
        if model in hub.gated and not entitled:
            return self._refuse(401, "GatedRepo")
        if file not in files:
            return self._refuse(404, "EntryNotFound")
        etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
        return self.answer(200, files[file], ETag=etag, X_Repo_Commit=commit, Accept_Ranges="none")


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Runs until the block is left; `hub.url` says where."""
    with serving(type("OfThese", (_Handler,), {"hub": hub})) as hub.url:
        yield hub
