"""A hub on the loopback interface: the endpoints that huggingface_hub asks for one or more models, and to upload."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from tests.helpers.loopback import Handler, serving

Files = Mapping[str, bytes]


@dataclass
class Hub:
    """`models` maps an id to its revisions, and those to files. `private` and `gated` ids need the token.

    Whoever has the token is `me`, and may write in `acme` too. `down` are beginnings of paths that fail, with
    the status to answer; `sent` counts the large files that were uploaded, `messages` are the commits'.
    """

    models: dict[str, dict[str, Files]]
    private: tuple[str, ...] = ()
    gated: tuple[str, ...] = ()
    token: str = "hf_secret"
    role: str = "write"
    url: str = ""
    requests: list[str] = field(default_factory=list)
    down: dict[str, int] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    sent: int = 0
    made: dict[str, object] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

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
        if path == "/api/whoami-v2":
            return self._whoami()
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

    # Uploads.

    @property
    def _entitled(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _whoami(self) -> None:
        if not self._entitled:
            return self.answer(401, b'{"error": "Invalid credentials in Authorization header"}')
        orgs = [{"name": "acme", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
        return self.json({"name": "me", "orgs": orgs, "auth": {"accessToken": {"role": self.hub.role}}})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_PUT(self) -> None:
        self.hub.large[self.path.rpartition("/")[2]] = self._body()
        self.hub.sent += 1
        self.answer(200)

    def do_POST(self) -> None:
        path, body = unquote(self.path.partition("?")[0]), self._body()
        for beginning, status in self.hub.down.items():
            if re.match(beginning, path):
                return self.answer(status, b'{"error": "out of order"}')
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if not self._entitled:
            return self.answer(401, b'{"error": "Invalid username or password."}')
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        for kind, pattern in {
            "_preupload": r"/api/models/([^/]+/[^/]+)/preupload/(.+)",
            "_batch": r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch)",
            "_commit": r"/api/models/([^/]+/[^/]+)/commit/(.+)",
            "_branch": r"/api/models/([^/]+/[^/]+)/branch/(.+)",
        }.items():
            if match := re.fullmatch(pattern, path):
                return getattr(self, kind)(*match.groups(), body)
        return self.answer(404)

    def _create(self, wanted: dict[str, object]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = json.dumps({"url": f"{self.hub.url}/{name}", "name": name, "id": name}).encode()
        if name in self.hub.models:
            return self.answer(409, url, Content_Type="application/json")
        self.hub.models[name] = {"main": {".gitattributes": b""}}
        self.hub.made[name] = wanted.get("visibility", wanted.get("private"))
        return self.answer(200, url, Content_Type="application/json")

    def _branch(self, model: str, name: str, body: bytes) -> None:
        branches = self.hub.models[model]
        if name in branches:
            return self.answer(409, b'{"error": "exists"}')
        branches[name] = dict(branches["main"])
        return self.answer(200, b"{}")

    def _preupload(self, model: str, revision: str, body: bytes) -> None:
        if revision not in self.hub.models.get(model, {}):
            return self._refuse(404, "RevisionNotFound")
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return self.json({"files": files})

    def _batch(self, model: str, _: str, body: bytes) -> None:
        objects: list[dict[str, object]] = []
        for wanted in json.loads(body)["objects"]:
            put = {"upload": {"href": f"{self.hub.url}/large/{wanted['oid']}"}}
            objects.append(wanted if wanted["oid"] in self.hub.large else {**wanted, "actions": put})
        return self.json({"transfer": "basic", "objects": objects})

    def _commit(self, model: str, revision: str, body: bytes) -> None:
        branches = self.hub.models[model]
        files = dict(branches[revision])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        branches[revision] = files
        commit = self.hub.commit(model, revision)
        return self.json({"commitUrl": f"{self.hub.url}/{model}/commit/{commit}", "commitOid": commit})


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Runs until the block is left; `hub.url` says where."""
    with serving(type("OfThese", (_Handler,), {"hub": hub})) as hub.url:
        yield hub


TOKEN = "hf_loopbackloopback12"


@contextmanager
def taking_uploads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process logs in to and uploads to; huggingface_hub has read its environment already."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    disable_progress_bars()  # they would be further lines on standard error
    try:
        with serve(Hub({}, token=TOKEN)) as server:
            monkeypatch.setattr(constants, "ENDPOINT", server.url)
            yield server
    finally:
        enable_progress_bars()
