"""From a folder or a hub id to local files."""

from collections.abc import Sequence
from pathlib import Path

from phi3_jax.config.hub_options import Hub, is_hub_id
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import local_path
from phi3_jax.system.secrets import remember
from phi3_jax.system.telling import taking
from phi3_jax.system.text import first_line

# What makes up a tokenizer and its template, beside which config.json counts (and more *.jinja files).
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
# What is downloaded. Never *.bin (pickles) and never *.py (remote code).
SMALL_FILES = ("*.json", "*.jinja", *(name for name in TOKENIZER_FILES if not name.endswith((".json", ".jinja"))))
CHECKPOINT_FILES = (*SMALL_FILES, "model*.safetensors")
# A pattern's star crosses folders: of these additional_chat_templates alone is wanted, and there is no word for "not".
OTHER_FOLDERS = ("[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "add[!i]*/*")
# What a checkpoint made of another one takes along of it.
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")


def resolve_checkpoint(
    path_or_hub_id: str | Path, hub: Hub | None = None, *, patterns: Sequence[str] = CHECKPOINT_FILES
) -> Path:
    """The local folder of a checkpoint or an adapter: the one given, or a hub repository's files in the cache.

    Args:
        path_or_hub_id: A folder, else an id such as `microsoft/Phi-3-mini-4k-instruct`.
        hub: How the hub is asked.
        patterns: Of the files to download from the repository's top folder.

    Raises:
        InputError: For what is neither folder nor hub id, for a repository or revision that does not exist or is
            closed to the user, and for files that are neither cached nor reachable.
    """
    hub = hub or Hub()
    remember(hub.token)  # so that no message shows it
    path = local_path(path_or_hub_id)
    if path.is_dir():
        return path
    name = str(path_or_hub_id)
    if path.exists():
        raise InputError(f"{name}: is a file, expected a checkpoint folder or a hub id; give the folder it is in")
    if not is_hub_id(name):
        raise InputError(f"{name}: no such folder, and no hub id either (owner/name); check the path")
    return _download(name, hub, patterns)


def _download(name: str, hub: Hub, patterns: Sequence[str]) -> Path:
    # Imported here: local folders need no hub client, and it takes a while.
    from huggingface_hub import errors, snapshot_download

    where = name if hub.revision is None else f"{name} at revision {hub.revision}"
    try:
        with taking(f"fetching {where} from the hub"):
            folder = snapshot_download(
                name,
                revision=hub.revision,
                token=hub.token,
                cache_dir=hub.cache_dir,
                local_files_only=hub.local_files_only,
                allow_patterns=list(patterns),
                ignore_patterns=list(OTHER_FOLDERS),
            )
    except errors.HFValidationError as error:
        raise InputError(f"{name}: no such folder, and no valid hub id either (owner/name)") from error
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name}: access is restricted; accept its terms on its hub page and log in (`hf auth login`, or a token)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{name}: no such folder here, and no such model on the hub that you may read; check the name, "
            "or log in (`hf auth login`, or a token) if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{where}: the model has no such revision; give a branch, a tag or a commit") from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{where}: no such folder here, and it is not (or not wholly) in the cache while the hub is not "
            "asked or not reachable; connect once, or give a local folder"
        ) from error
    # The network client's own errors differ from one release of huggingface_hub to the next.
    except Exception as error:
        raise InputError(f"{where}: could not be downloaded ({first_line(error)}); try again") from error
    return Path(folder)
