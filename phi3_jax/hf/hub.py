"""From a folder or a hub id to local files, and the tokenizer that lies among them."""

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phi3_jax.config import LARGEST
from phi3_jax.errors import InputError
from phi3_jax.reading import check_file, local_path, read_json
from phi3_jax.secrets import remember
from phi3_jax.text import shown

# Never *.bin (pickles) and never *.py (remote code).
TOKENIZER_FILES = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
CHECKPOINT_FILES = (*TOKENIZER_FILES, "model*.safetensors", "adapter_model.safetensors")
# The JSON files among these that say something of the tokenizer.
TOKENIZER_JSON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "config.json",
    "vocab.json",
)
MAX_TOKENIZER = 128 * 2**20  # bytes of one file
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
        raise InputError(f"{where}: could not be downloaded ({_first_line(error)}); try again") from error
    return Path(folder)


def load_tokenizer(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Any:
    """The transformers tokenizer of a checkpoint, without remote code.

    What a tokenizer.json says is what counts, whatever class tokenizer_config.json names: Phi-3's
    says `LlamaTokenizer`, and transformers 5 builds another tokenizer from that name, with other
    ids after special tokens, wherever it does not find a config.json of model_type `phi3` that it
    can read. Padding and truncation stored in the file are dropped, `add_bos_token` is heeded
    (transformers 5 forgets it where there is a tokenizer.json).

    Raises `InputError` where there is no tokenizer, or one that transformers cannot read.
    """
    folder = resolve_checkpoint(
        path_or_hub_id,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        patterns=TOKENIZER_FILES,
    )
    has_fast = (folder / "tokenizer.json").is_file()
    if not has_fast and not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json")):
        raise InputError(
            f"{path_or_hub_id}: no tokenizer.json or tokenizer.model in it; add the checkpoint's tokenizer"
        )
    _check_files(folder)
    config = tokenizer_config(folder)

    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        with _silent():
            if has_fast:
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            else:
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            tokenizer("a", add_special_tokens=False)
    # Broken files surface as almost anything, also as the bare Exception of the Rust library, or its panic.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{path_or_hub_id}: its tokenizer cannot be read ({_first_line(error)})") from error
    if has_fast:
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
        if config.get("add_bos_token") is True and tokenizer.bos_token is not None:
            _prepend_bos(tokenizer)
    return tokenizer


def _check_files(folder: Path) -> None:
    """Looks at what transformers is going to read, which follows every link and takes any size."""
    patterns = (*TOKENIZER_FILES, "additional_chat_templates/*.jinja")
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        if file.suffix == ".json" and file.name not in TOKENIZER_JSON:
            continue  # says nothing of the tokenizer
        check_file(file)
        if file.stat().st_size > MAX_TOKENIZER:
            raise InputError(f"{file}: is larger than {MAX_TOKENIZER / 2**20:g} MiB, which no tokenizer is")
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            read_json(folder / name)
    if (folder / "tokenizer.json").exists():
        _check_numbers(folder / "tokenizer.json")


def _check_numbers(file: Path) -> None:
    """Raises `InputError` for tokens whose numbers no model has; the library makes tables of that length."""
    try:
        raw = json.loads(file.read_bytes())
        vocabulary = raw["model"].get("vocab")
        numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
        largest = max([*numbers, *(token["id"] for token in raw.get("added_tokens", ()))], default=0)
        if largest < LARGEST["vocab_size"]:
            return
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return  # the library says what is wrong
    raise InputError(f"{file}: has token {shown(largest)}, expected numbers below {LARGEST['vocab_size']}")


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """The contents of tokenizer_config.json; empty where there is none."""
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _prepend_bos(tokenizer: Any) -> None:
    """As LlamaTokenizerFast did with `add_bos_token`; nothing where the file does so already."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    if tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
        )


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps what the Rust library writes to the terminal by itself, past Python, from coming there."""
    try:
        before = {number: os.dup(number) for number in (1, 2)}
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    try:
        for number in before:
            os.dup2(nowhere, number)
        yield
    finally:
        for number, kept in before.items():
            os.dup2(kept, number)
            os.close(kept)
        os.close(nowhere)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
