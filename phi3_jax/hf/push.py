"""The hub, the other way: adapters and models uploaded to repositories there."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from phi3_jax.config.hub_options import PushTarget, is_hub_id
from phi3_jax.hf.files import CONFIG, INDEX
from phi3_jax.hf.hub import LICENCE_FILES, TOKENIZER_FILES
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import check_file, local_path, read_json
from phi3_jax.system.secrets import remember
from phi3_jax.system.text import first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What makes up an adapter or a model; what else lies in its folder stays here (states, logs, pickles).
UPLOADED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    CONFIG,
    "generation_config.json",
    INDEX,
    "model*.safetensors",
    "README.md",
    *TOKENIZER_FILES,
    "*.jinja",
    "additional_chat_templates/*.jinja",
    *LICENCE_FILES,
)


class PushError(InputError):
    """An upload failed; what was to be uploaded is as it was."""


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload with phi3_jax",
) -> str:
    """Uploads an adapter's or a model's folder, as `save_adapter`, `save_pretrained` and runs leave it.

    Args:
        folder: What to upload; states, logs and pickles in it stay here.
        repo_id: `owner/name`, or a name alone for one of the token's owner; made where it is not there.
        private: Whether it is then made private; None for what its owner has as default.
        revision: Branch, made where it is not there; None for the main one.
        token: What to log in with; None for HF_TOKEN, or what `hf auth login` has stored.
        commit_message: What the repository's history says.

    Returns:
        Where it is found.

    Raises:
        InputError: As `HubRepository.open`, and for a folder that holds neither an adapter nor a model.
        PushError: Where the upload fails; called again, it goes on where it was.

    Example:
        >>> import phi3_jax as p3
        >>> from phi3_jax.demo import demo_path
        >>> try:
        ...     p3.push_to_hub(demo_path("base"), "my lamps")
        ... except p3.InputError as error:
        ...     print(error)
        'my lamps' is no id of a repository on the hub, expected owner/name, or a name alone
    """
    folder = local_path(folder)
    check_uploadable(folder)
    repository = HubRepository.open(PushTarget(repo_id, private, revision, token))
    repository.upload(folder, commit_message)
    return repository.url


@dataclass(frozen=True)
class HubRepository:
    """A model repository on the hub that may be written to; `open` sees to that.

    Attributes:
        name: `owner/name`.
        revision: Branch that is uploaded to, None for the main one.
        api: The client, with the token.
    """

    name: str
    revision: str | None
    api: "HfApi"

    @classmethod
    def open(cls, target: PushTarget) -> Self:
        """Finds the repository, or makes it, before anything is computed for it.

        The token is the one given, else huggingface_hub's: HF_TOKEN, or what `hf auth login` has stored.

        Raises:
            InputError: For an id that the hub does not allow, without a token or with one that may not write there,
                and where the hub is not reachable.
        """
        # Imported here: nothing else needs the client, and it takes a while.
        from huggingface_hub import HfApi, constants, get_token

        name, token = target.repo_id, target.token or get_token()
        remember(token)
        if not is_hub_id(name):
            raise _no_id(name)
        if constants.HF_HUB_OFFLINE:
            raise InputError(f"{name}: HF_HUB_OFFLINE is set, so that nothing can be uploaded there; unset it")
        if token is None:
            raise InputError(f"{name}: no token to upload with; log in (`hf auth login`), or set HF_TOKEN")
        api = HfApi(token=token, library_name="phi3_jax")
        with _told(name):
            _check_rights(name, api.whoami())
            url = api.create_repo(name, private=target.private, exist_ok=True)
            if target.revision not in (None, "main") and not str(target.revision).startswith("refs/"):
                api.create_branch(url.repo_id, branch=str(target.revision), exist_ok=True)
        return cls(url.repo_id, target.revision, api)

    @property
    def url(self) -> str:
        """Where people find it."""
        return f"{self.api.endpoint}/{self.name}" + (f"/tree/{self.revision}" if self.revision else "")

    def command(self, folder: Path) -> str:
        """What a person types to upload a folder there."""
        revision = ["--hub-revision", self.revision] if self.revision else []
        return shlex.join(["phi3-jax", "export", str(folder), "--push-to-hub", self.name, *revision])

    def upload(self, folder: Path, message: str, *, to: str | None = None, everything: bool = False) -> list[str]:
        """Uploads an adapter's or a model's files in one commit; files that are there already are not sent again, so
        that an upload that was cut off goes on where it was.

        Args:
            folder: What holds them.
            message: The commit's.
            to: Folder in the repository, where not its top.
            everything: Whatever lies in the folder, and nothing else: what was there before under `to` goes.

        Returns:
            The names of what stays here.

        Raises:
            PushError: Where it fails.
            InputError: For a link out of the folder, and where there is nothing to upload.
        """
        files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
        chosen = files if everything else uploaded(folder)
        if not chosen:
            raise _nothing_in(folder)
        for name in chosen:
            check_file(folder / name)
        try:
            with _told(self.name):
                self.api.upload_folder(
                    repo_id=self.name,
                    folder_path=folder,
                    path_in_repo=to,
                    commit_message=message,
                    revision=self.revision,
                    allow_patterns=chosen,
                    delete_patterns="*" if everything else None,
                )
        except InputError as error:
            raise PushError(str(error)) from error
        return [name for name in files if name not in chosen]


def uploaded(folder: Path) -> list[str]:
    """The files of a folder that make up an adapter or a model; empty where it holds neither."""
    found = {path for pattern in UPLOADED for path in folder.glob(pattern) if path.is_file()}
    names = sorted(str(path.relative_to(folder)) for path in found)
    return names if {"adapter_config.json", CONFIG} & set(names) else []


def check_uploadable(folder: Path) -> None:
    """Raises `InputError` for a folder that holds neither an adapter nor a model."""
    if not uploaded(folder):
        raise _nothing_in(folder)


def local_base(folder: Path) -> str | None:
    """A line on an adapter that names a folder of this machine as its base; None for others, and for models."""
    file = folder / "adapter_config.json"
    base = read_json(file).get("base_model_name_or_path") if file.is_file() else None
    if not isinstance(base, str) or not local_path(base).is_dir():
        return None
    return (
        f"note: the adapter names the folder {base} as its base, which nobody else can load; train from the base's id "
        "on the hub or name it in peft.base_model_name_or_path, or upload both as one model (phi3-jax export --merge)"
    )


def _no_id(name: str) -> InputError:
    return InputError(f"{name!r} is no id of a repository on the hub, expected owner/name, or a name alone")


def _nothing_in(folder: Path) -> InputError:
    return InputError(f"{folder}: holds neither an adapter nor a model; nothing to upload")


def _check_rights(name: str, me: object) -> None:
    """Looks at what the hub says of the token's owner, as far as that tells. Raises `InputError`."""
    if not isinstance(me, dict):
        return
    access = (me.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise InputError(f"{name}: the token may only read; make one that may write (on the hub: Settings, Tokens)")
    owner, separator, _ = name.partition("/")
    roles = {org.get("name"): org.get("roleInOrg") for org in me.get("orgs") or ()}
    if separator and owner not in (me.get("name"), *roles):
        where = f" ({', '.join(map(str, roles))})" if roles else ""
        raise InputError(
            f"{name}: {owner} is neither you, {me.get('name')}, nor an organisation of yours{where}; name one of these"
        )
    if roles.get(owner) == "read":
        raise InputError(f"{name}: you may only read in {owner}; ask there for the right to write, or name another")


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turns what goes wrong at the hub into one line."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except InputError:
        raise
    except HFValidationError as error:
        raise _no_id(name) from error
    # The network client's own errors differ from one release of huggingface_hub to the next.
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reasons: dict[object, str] = {
            401: "the token is not valid any more; log in again (`hf auth login`), or mend HF_TOKEN",
            403: "the token may not write there; make one that may (on the hub: Settings, Tokens)",
            404: "no such repository or branch, or the token may not see it; check the name",
        }
        said = first_line(error)
        other = f"the hub answered {status} ({said}); try again" if status else f"the hub is not reachable ({said})"
        raise InputError(f"{name}: {reasons.get(status, other)}") from error
