"""Tokenizers of checkpoints: transformers', from files that are looked at before it reads them."""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phi3_jax.config.model import LARGEST
from phi3_jax.hf.hub import TOKENIZER_FILES, first_line, resolve_checkpoint
from phi3_jax.system.errors import InputError
from phi3_jax.system.panic import PanicException, attempt, is_panic, may_panic_when_read
from phi3_jax.system.reading import check_file, read_json
from phi3_jax.system.text import shown

# The JSON files among `TOKENIZER_FILES` that say something of the tokenizer.
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
MAX_GROWTH = 100  # of a text; a space becomes one character


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
        raise InputError(f"{path_or_hub_id}: its tokenizer cannot be read ({first_line(error)})") from error
    if has_fast:
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
        if config.get("add_bos_token") is True and tokenizer.bos_token is not None:
            _prepend_bos(tokenizer)
    return tokenizer


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
        _check_tables(folder / "tokenizer.json")


def _check_tables(file: Path) -> None:
    """Raises `InputError` for what the library would take any amount of memory for: tokens whose numbers no model
    has, for it makes tables of that length, and replacements that make a long text of a short one. And for what it
    gives up over."""
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


def _growth(step: Any) -> float:
    """How many times as long a text can become in a normalizer or a decoder, at most."""
    if not isinstance(step, dict):
        return 1.0
    growth = 1.0
    for part in (*step.get("normalizers", ()), *step.get("decoders", ())):
        growth *= _growth(part)
    if step.get("type") == "Replace":
        growth *= max(1.0, len(step["content"]) / max(1, len(step["pattern"].get("String", ""))))
    return growth


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
