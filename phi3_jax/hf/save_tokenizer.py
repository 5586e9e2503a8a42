"""Tokenizers written beside adapters and models: the files they came from, byte for byte where these say the same."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.hf.hub import LICENCE_FILES
from phi3_jax.hf.tokenizer import has_tokenizer, read_tokenizer, tokenizer_config, tokenizer_files
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import check_file, read_json, read_text

FAST, FAST_CONFIG, SENTENCES, TEMPLATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
)
OTHER_TEMPLATES = "additional_chat_templates"
# What a tokenizer does besides its tables, and what a program may have set.
SETTINGS = ("padding_side", "truncation_side", "model_max_length", "model_input_names", "clean_up_tokenization_spaces")
# The class that transformers 4 and 5 know both for a tokenizer that is all in tokenizer.json.
PORTABLE_CLASS = "PreTrainedTokenizerFast"


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, licence: bool = False) -> None:
    """Writes a tokenizer so that `AutoTokenizer` of transformers 4 and 5 makes the same of it.

    One that is still what its files say is copied, tokenizer.model and all; of its settings nothing is
    written anew but a chat template that is another now. One that a program made or changed is saved by
    transformers, and what only transformers 5 can read of that is put in words that both know.

    Args:
        tokenizer: What to write.
        folder: Where to.
        licence: The folder is to be a model of its own: the checkpoint's licence goes along, and a config.json comes
            to lie there, by which `AutoTokenizer` knows what Phi-3's `tokenizer_class` stands for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = getattr(tokenizer, "name_or_path", None)
    origin = Path(name) if name else None
    found = _read(origin) if origin is not None and (origin / FAST).is_file() else None
    if origin is None or found is None or not is_same(tokenizer, found):
        tokenizer.save_pretrained(folder)
        _make_portable(folder, tokenizer)
        if origin is not None:
            _add_sentences(origin, folder)
    else:
        copy_files(origin, folder)
        if tokenizer.chat_template != found.chat_template:
            write_template(folder, tokenizer.chat_template)
        if not licence:
            _name_class(folder, tokenizer)
    if licence and origin is not None:
        copy_licence(origin, folder)


def save_merged_tokenizer(base: Path, adapter: Path, folder: Path) -> None:
    """Writes the tokenizer of a merged model: the base's files, or where the adapter has another one, the adapter's.

    Args:
        base: The base's folder.
        adapter: The adapter's.
        folder: Where to.

    Raises:
        InputError: For a tokenizer of the adapter that cannot be read, and for links out of these folders.
    """
    own = read_tokenizer(adapter, str(adapter)) if has_tokenizer(adapter) else None
    found = _read(base)
    template: object = own.chat_template if own is not None else template_alone(adapter)
    if own is None or (found is not None and own.is_fast and is_same(own, found)):
        copy_files(base, folder)
        if template is not None and found is not None and template != found.chat_template:
            write_template(folder, template)
    else:
        copy_files(adapter, folder)
        _add_sentences(base, folder)
    copy_licence(base, folder)


def template_alone(folder: Path) -> str | None:
    """The chat template in a folder that has no tokenizer, in the place that transformers would look at first.

    Raises:
        InputError: For one that is no text.
    """
    if (folder / TEMPLATE).exists():
        return read_text(folder / TEMPLATE)
    for name in ("chat_template.json", FAST_CONFIG):
        found = read_json(folder / name).get("chat_template") if (folder / name).exists() else None
        if isinstance(found, str):
            return found
        if found is not None:
            raise InputError(f"{folder / name}: chat_template is no text; give one template, in {TEMPLATE}")
    return None


def is_same(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers do the same, whatever their templates are."""
    return _state(one) == _state(other)


def copy_files(source: Path, folder: Path) -> None:
    """Copies a tokenizer's files, byte for byte. Raises `InputError` for a link out of the folder."""
    for file in tokenizer_files(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def copy_licence(source: Path, folder: Path) -> None:
    """Copies what a checkpoint says of its licence. Raises `InputError` for a link out of the folder."""
    for pattern in LICENCE_FILES:
        for file in sorted(source.glob(pattern)):
            check_file(file)
            shutil.copyfile(file, folder / file.name)


def write_template(folder: Path, template: object) -> None:
    """Gives the tokenizer in a folder another chat template, wherever there was one.

    Args:
        folder: Where the tokenizer lies.
        template: A text, several by name, or None for no template.
    """
    others: dict[str, str] = dict(template) if isinstance(template, Mapping) else {}
    first = others.pop("default", None) if isinstance(template, Mapping) else template
    (folder / "chat_template.json").unlink(missing_ok=True)  # an older place
    (folder / TEMPLATE).unlink(missing_ok=True)
    shutil.rmtree(folder / OTHER_TEMPLATES, ignore_errors=True)
    if isinstance(first, str):
        (folder / TEMPLATE).write_text(first, encoding="utf-8", newline="")
    for name, text in others.items():
        (folder / OTHER_TEMPLATES).mkdir(exist_ok=True)
        (folder / OTHER_TEMPLATES / f"{name}.jinja").write_text(text, encoding="utf-8", newline="")
    config = tokenizer_config(folder)
    if "chat_template" in config:  # programs that know no other place are to find this one too
        del config["chat_template"]
        _write_config(folder, config | ({"chat_template": first} if isinstance(first, str) else {}))


def _state(tokenizer: Tokenizer) -> tuple[object, ...]:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for passing in ("padding", "truncation"):  # as the last call had them
        backend.pop(passing, None)
    settings = tuple(repr(getattr(tokenizer, name, None)) for name in SETTINGS)
    return backend, dict(tokenizer.special_tokens_map), settings


def _read(folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder; None where there is none any more that can be read."""
    try:
        tokenizer = read_tokenizer(folder, str(folder))
    except InputError:
        return None
    return tokenizer if tokenizer.is_fast else None


def _name_class(folder: Path, tokenizer: Tokenizer) -> None:
    """Names a class that reads tokenizer.json as it is, and says there what the class named before did besides.

    Phi-3's `LlamaTokenizer` becomes another tokenizer in transformers 5 wherever no config.json of Phi-3 lies beside.
    """
    config = tokenizer_config(folder)
    if config.get("tokenizer_class") != PORTABLE_CLASS:
        _write_config(folder, config | {"tokenizer_class": PORTABLE_CLASS})
    if config.get("add_bos_token") is True:
        raw = read_json(folder / FAST)
        step = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"]
        if step != raw.get("post_processor"):
            text = json.dumps(raw | {"post_processor": step}, ensure_ascii=False, indent=2)
            (folder / FAST).write_text(text, encoding="utf-8", newline="")


def _make_portable(folder: Path, tokenizer: Tokenizer) -> None:
    """Puts what transformers 5 has written in words that transformers 4 reads alike, and adds what it left out."""
    config = tokenizer_config(folder)
    if not config:  # no tokenizer of transformers
        return
    for side in ("padding_side", "truncation_side"):
        if isinstance(value := getattr(tokenizer, side, None), str):
            config[side] = value
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = PORTABLE_CLASS
    if isinstance(config.get("extra_special_tokens"), list):  # a mapping in transformers 4
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for passing in ("backend", "is_local", "local_files_only"):  # of the loading
        config.pop(passing, None)
    _write_config(folder, config)


def _add_sentences(source: Path, folder: Path) -> None:
    """Copies tokenizer.model, which llama.cpp converts by, beside a tokenizer.json of the same vocabulary."""
    if (folder / SENTENCES).exists() or not all((source / name).is_file() for name in (SENTENCES, FAST)):
        return
    check_file(source / SENTENCES)
    if (folder / FAST).is_file() and _vocabulary(source / FAST) == _vocabulary(folder / FAST):
        shutil.copyfile(source / SENTENCES, folder / SENTENCES)


def _vocabulary(file: Path) -> object:
    model = read_json(file).get("model")
    return model.get("vocab") if isinstance(model, dict) else None


def _write_config(folder: Path, config: Mapping[str, object]) -> None:
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (folder / FAST_CONFIG).write_text(text, encoding="utf-8", newline="")
