"""Settings as the YAML that `--config` reads, with a word about each."""

from collections.abc import Mapping, Sequence

import yaml

_WIDTH = 120


def commented_yaml(settings: Mapping[str, object], why: Mapping[str, str], title: Sequence[str] = ()) -> str:
    """A configuration file of a run.

    Args:
        settings: By `section.key`; a section's lie together.
        why: What to say of some of them, by the same names.
        title: Lines of the comment at the top.

    Example:
        >>> settings = {"data.train": "chats.jsonl", "data.max_length": 512}
        >>> print(commented_yaml(settings, {"data.max_length": "the longest"}))
        data:
          train: chats.jsonl
          max_length: 512  # the longest
    """
    lines = [f"# {line}".rstrip() for line in title]
    section = None
    for name, value in settings.items():
        here, _, key = name.partition(".")
        if here != section:
            lines.append(f"{here}:")
            section = here
        entry = yaml.safe_dump({key: value}, allow_unicode=True, width=10**6).rstrip("\n")
        entry = "\n".join(f"  {line}" for line in entry.splitlines())
        if name in why:
            beside = f"{entry}  # {why[name]}"
            entry = beside if len(beside) <= _WIDTH and "\n" not in entry else f"  # {why[name]}\n{entry}"
        lines.append(entry)
    return "\n".join(lines)
