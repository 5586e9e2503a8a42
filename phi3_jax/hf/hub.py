"""From a folder or a hub id to local files, and the tokenizer that lies among them."""

import re
from collections.abc import Sequence
from pathlib import Path

from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import local_path
from phi3_jax.system.secrets import remember

# Never *.bin (pickles) and never *.py (remote code).
TOKENIZER_FILES = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
CHECKPOINT_FILES = (*TOKENIZER_FILES, "model*.safetensors", "adapter_model.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve_checkpoint(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    patterns: Sequence[str] = CHECKPOINT_FILES,
) -> Path:
    """The local folder of a checkpoint: the one given, or a hub repository's files in the cache.

    **Arguments**
    - `path_or_hub_id`: a folder, else an id such as `microsoft/Phi-3-mini-4k-instruct`.
    - `revision`, `token`, `cache_dir`, `local_files_only`: as in huggingface_hub; a local folder
      needs none of them. `HF_HUB_OFFLINE=1` works like `local_files_only`.
    - `patterns`: of the files to download from the repository's top folder.

    Raises `InputError` for what is neither folder nor hub id, for a repository or revision that
    does not exist or is closed to the user, and for files that are neither cached nor reachable.
    """
    remember(token)  # so that no message shows it
    path = local_path(path_or_hub_id)
    if path.is_dir():
        return path
    name = str(path_or_hub_id)
    if path.exists():
        raise InputError(f"{name}: is a file, expected a checkpoint folder or a hub id; give the folder it is in")
    if not _HUB_ID.fullmatch(name):
        raise InputError(f"{name}: no such folder, and no hub id either (owner/name); check the path")

    # Imported here: local folders need no hub client, and it takes a while.
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    where = name if revision is None else f"{name} at revision {revision}"
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],  # a pattern's star crosses folders
        )
    except hub.HFValidationError as error:
        raise InputError(f"{name}: no such folder, and no valid hub id either (owner/name)") from error
    except hub.GatedRepoError as error:
        raise InputError(
            f"{name}: access is restricted; accept its terms on its hub page and log in (`hf auth login`, or a token)"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise InputError(
            f"{name}: no such folder here, and no such model on the hub that you may read; check the name, "
            "or log in (`hf auth login`, or a token) if it is private"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise InputError(f"{where}: the model has no such revision; give a branch, a tag or a commit") from error
    except hub.LocalEntryNotFoundError as error:
        raise InputError(
            f"{where}: no such folder here, and it is not (or not wholly) in the cache while the hub is not "
            "asked or not reachable; connect once, or give a local folder"
        ) from error
    # The network client's own errors differ from one release of huggingface_hub to the next.
    except Exception as error:
        raise InputError(f"{where}: could not be downloaded ({first_line(error)}); try again") from error
    return Path(folder)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
