"""Tokenizers of checkpoints: transformers', from files that are looked at before it reads them."""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_jax.config.hub_options import Hub
from phi3_jax.config.model import LARGEST
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.hf.arguments import OF_TOKENIZER, pass_over
from phi3_jax.hf.hub import SMALL_FILES, TOKENIZER_FILES, resolve_checkpoint
from phi3_jax.system.errors import InputError
from phi3_jax.system.panic import PanicException, attempt, is_panic, may_panic_when_read
from phi3_jax.system.reading import check_file, read_json
from phi3_jax.system.text import first_line, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_TOKENIZER = 128 * 2**20  # bytes of one file
MAX_GROWTH = 100  # of a text; a space becomes one character


def load_tokenizer(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **others: object,
) -> Tokenizer:
    """The transformers tokenizer of a checkpoint, without remote code.

    What a tokenizer.json says is what counts, whatever class tokenizer_config.json names: Phi-3's
    says `LlamaTokenizer`, and transformers 5 builds another tokenizer from that name, with other
    ids after special tokens, wherever it does not find a config.json of model_type `phi3` that it
    can read. Padding and truncation stored in the file are dropped, `add_bos_token` is heeded
    (transformers 5 forgets it where there is a tokenizer.json).

    Args:
        path_or_hub_id: Folder, or hub id whose tokenizer is downloaded and cached.
        revision: Branch, tag or commit on the hub.
        token: To log in to the hub with.
        cache_dir: Where downloads are kept.
        local_files_only: Never ask the network.
        others: `trust_remote_code` and `use_fast` of transformers, which are named as passed over.

    Raises:
        InputError: Where there is no tokenizer, or one that transformers cannot read.
        TypeError: For other arguments of transformers; most are attributes that the tokenizer has afterwards.

    Example:
        >>> import phi3_jax as p3
        >>> from phi3_jax.demo import demo_path
        >>> tokenizer = p3.load_tokenizer(demo_path("base"))
        >>> ids = tokenizer.encode("Hello", add_special_tokens=False)
        >>> tokenizer.decode(ids)
        'Hello'
    """
    pass_over("load_tokenizer", others, ("revision", "token", "cache_dir", "local_files_only"), OF_TOKENIZER)
    hub = Hub(revision, token, cache_dir, local_files_only)
    return read_tokenizer(resolve_checkpoint(path_or_hub_id, hub, patterns=SMALL_FILES), str(path_or_hub_id))


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer's own file is in the folder; templates and settings alone are none."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in the folder, to be copied elsewhere.

    Raises:
        InputError: For a link out of the folder, whose target would be copied.
    """
    named = {folder / name for name in TOKENIZER_FILES if (folder / name).exists()}
    files = sorted(named.union(folder.glob("additional_chat_templates/*.jinja")))
    for file in files:
        check_file(file)
    return files


def read_tokenizer(folder: Path, name: str) -> Tokenizer:
    """The tokenizer in a folder, as `load_tokenizer` says. Messages call it by the name."""
    has_fast = (folder / "tokenizer.json").is_file()
    if not has_tokenizer(folder) and not (folder / "vocab.json").is_file():
        raise InputError(f"{name}: no tokenizer.json or tokenizer.model in it; add the checkpoint's tokenizer")
    _check_files(folder)
    config = tokenizer_config(folder)

    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        with _without_log():
            if has_fast:
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            else:
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            tokenizer("a", add_special_tokens=False)
    # Broken files surface as almost anything, also as the bare Exception of the Rust library, or its panic.
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise InputError(f"{name}: its tokenizer cannot be read ({first_line(error)})") from error
    if has_fast:
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
        if config.get("add_bos_token") is True and tokenizer.bos_token is not None:
            _prepend_bos(tokenizer)
    read: Tokenizer = tokenizer
    return read


@contextmanager
def _without_log() -> Iterator[None]:
    """What transformers logs in this thread is not shown: advice on a model's settings, and what the error says."""
    thread = threading.get_ident()
    handlers = logging.getLogger("transformers").handlers

    def is_other(record: logging.LogRecord) -> bool:
        return record.thread != thread

    for handler in handlers:
        handler.addFilter(is_other)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_other)


def _check_files(folder: Path) -> None:
    """Looks at what transformers is going to read, which follows every link and takes any size."""
    named = {file for file in folder.iterdir() if file.name in (*TOKENIZER_FILES, "config.json")}
    for file in sorted(named.union(folder.glob("*.jinja"), folder.glob("additional_chat_templates/*.jinja"))):
        check_file(file)
        if file.stat().st_size > MAX_TOKENIZER:
            raise InputError(f"{file}: is larger than {MAX_TOKENIZER / 2**20:g} MiB, which no tokenizer is")
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            read_json(folder / name)
    if (folder / "tokenizer.json").exists():
        _check_tables(folder / "tokenizer.json")


def _check_tables(file: Path) -> None:
    """Refuses what the library would take any amount of memory for.

    Tokens whose numbers no model has, for it makes tables of that length, and replacements that make a long text
    of a short one. And what it gives up over. Raises `InputError`.
    """
    try:
        content = file.read_bytes()
        raw = json.loads(content)
        vocabulary = raw["model"].get("vocab")
        numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
        largest = max([*numbers, *(token["id"] for token in raw.get("added_tokens", ()))], default=0)
        growth = max(_growth(raw.get("normalizer")), _growth(raw.get("decoder")))
        if largest < LARGEST["vocab_size"] and growth <= MAX_GROWTH:
            if may_panic_when_read(raw):
                attempt(content.decode(), ["a"])
            return
    except PanicException as error:
        raise InputError(f"{file}: this tokenizer cannot be read ({first_line(error)})") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return  # the library says what is wrong
    if growth > MAX_GROWTH:
        raise InputError(
            f"{file}: its replacements can make a text more than {MAX_GROWTH} times as long, which no tokenizer's do; "
            "give a checkpoint with another"
        )
    raise InputError(f"{file}: has token {shown(largest)}, expected numbers below {LARGEST['vocab_size']}")


def _growth(step: object) -> float:
    """How many times as long a text can become in a normalizer or a decoder, at most."""
    if not isinstance(step, dict):
        return 1.0
    growth = 1.0
    for part in (*step.get("normalizers", ()), *step.get("decoders", ())):
        growth *= _growth(part)
    if step.get("type") == "Replace":
        growth *= max(1.0, len(step["content"]) / max(1, len(step["pattern"].get("String", ""))))
    return growth


def tokenizer_config(folder: Path) -> dict[str, object]:
    """The contents of tokenizer_config.json; empty where there is none."""
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _prepend_bos(tokenizer: "PreTrainedTokenizerFast") -> None:
    """As LlamaTokenizerFast did with `add_bos_token`; nothing where the file does so already."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    if tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
