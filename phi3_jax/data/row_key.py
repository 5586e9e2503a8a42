"""A name for what rows become, by all that it depends on: the rows, the tokenizer, the settings and the versions.

Content counts and not where it lies or when it was written: the same rows have the same name on every host, and a
byte that changes makes another.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np

from phi3_jax.config.sections import DataSection
from phi3_jax.data.row_tokenizer import Row
from phi3_jax.data.sources import Rows, WithContent
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.system.packages import package_versions

# Settings that say which rows there are, which are looked at themselves, or what is done with tokenised ones.
# Everything else counts, so that a setting that nobody thought of here makes a new name and not a wrong one.
NOT_COUNTED = frozenset(
    {
        "train",
        "eval",
        "eval_fraction",
        "split",
        "eval_split",
        "dataset_config",
        "packing",
        "eval_packing",
        "shuffle",
        "streaming",
        "shuffle_buffer_size",
        "max_rows",
        "cache",
    }
)

_PLAIN = frozenset((str, int, float, bool, type(None)))


class RowKeys:
    """Names sets of rows that are read and tokenised in the same way.

    Args:
        tokenizer: Whose template and ids they become.
        data: How they are read and tokenised.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> from phi3_jax.data.sources import Source
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
        >>> rows = [Row(Source("a list", [{"text": "a"}]), 0)]
        >>> keys = [RowKeys(tokenizer, DataSection(max_length=length, packing=packs)) for length, packs in
        ...         ((16, True), (16, False), (32, True))]
        >>> keys[0](rows) == keys[1](rows), keys[0](rows) == keys[2](rows)
        (True, False)
    """

    def __init__(self, tokenizer: Tokenizer, data: DataSection) -> None:
        self._tokenizer, self._data = tokenizer, data
        self._common: str | None = None
        self._sources: dict[int, tuple[Rows, str]] = {}  # kept with their rows, so that no other's take their id

    def __call__(self, rows: Sequence[Row]) -> str | None:
        """32 hexadecimal digits; None for rows that hold something whose content cannot be told."""
        if self._common is None:
            self._common = _digest(tokenizer_parts(self._tokenizer), settings_parts(self._data), _versions())
        sources = {id(row.source): row.source for row in rows}
        number = {each: index for index, each in enumerate(sources)}
        chosen = np.array([(number[id(row.source)], row.index) for row in rows], np.int64)
        try:
            content = [(source.name, self._content(source.rows)) for source in sources.values()]
        except ValueError:
            return None
        return _digest([self._common.encode(), json.dumps(content).encode(), chosen.tobytes()])[:32]

    def _content(self, rows: Rows) -> str:
        if id(rows) not in self._sources:
            pieces = rows.content() if isinstance(rows, WithContent) else _plain_content(rows)
            self._sources[id(rows)] = rows, _digest(pieces)
        return self._sources[id(rows)][1]


def _digest(*parts: Iterator[bytes] | Sequence[bytes]) -> str:
    digest = hashlib.blake2b()
    for part in parts:
        for piece in part:
            digest.update(len(piece).to_bytes(8, "little"))
            digest.update(piece)
        digest.update(b"end of part")
    return digest.hexdigest()


def _plain_content(rows: Rows) -> Iterator[bytes]:
    """Of rows that are objects. Raises `ValueError` for what does not show all that it holds, as an array does."""
    for index in range(len(rows)):
        row = dict(rows[index])
        _check_plain(row)
        # Unlike JSON it tells 1 from True and from "1" as a key, and a list from a tuple, as templates do.
        yield repr(row).encode()


def _check_plain(value: object) -> None:
    # Exactly these types: others that are based on them may show anything.
    if type(value) is dict:
        _check_plain([*value, *value.values()])
    elif isinstance(value, list | tuple) and type(value) in (list, tuple):
        for part in value:
            _check_plain(part)
    elif type(value) not in _PLAIN:
        raise ValueError(f"a {type(value).__name__}")


def tokenizer_parts(tokenizer: Tokenizer) -> list[bytes]:
    """What a tokenizer makes of rows depends on: its vocabulary and rules, its template and its special tokens."""
    template = tokenizer.chat_template
    templates = dict(template) if isinstance(template, Mapping) else template
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    described = [type(tokenizer).__qualname__, templates, named, tokenizer.bos_token_id, tokenizer.eos_token_id]
    if "strftime_now" in json.dumps(templates):
        described.append(date.today().isoformat())  # the template writes the date
    return [tokenizer.backend_tokenizer.to_str().encode("utf-8", "surrogatepass"), json.dumps(described).encode()]


def settings_parts(data: DataSection) -> list[bytes]:
    """The settings that rows depend on."""
    counted = {name: value for name, value in asdict(data).items() if name not in NOT_COUNTED}
    if not data.packing:
        counted["packing_strategy"] = DataSection.packing_strategy
    return [json.dumps(counted, sort_keys=True).encode()]


@cache
def _versions() -> list[bytes]:
    """Of the programs that make rows; of this one its text too, since a working copy changes under one version."""
    versions = package_versions("phi3_jax", "transformers", "tokenizers", "jinja2")
    own = sorted(Path(__file__).parent.glob("*.py"))
    return [json.dumps(versions).encode(), *(file.read_bytes() for file in own)]
