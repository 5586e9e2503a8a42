"""How the hub is asked: what its ids look like, and the options that say which files are meant and who may ask."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a model or dataset on the hub: `owner/name`, or a name alone."""
    return _ID.fullmatch(name) is not None


@dataclass(frozen=True)
class Hub:
    """The options of huggingface_hub that a download takes; a local folder needs none of them.

    Attributes:
        revision: Branch, tag or commit; None for the main branch.
        token: What to log in with; None for the one that is stored here, False for none at all.
        cache_dir: Where downloads are kept; None for huggingface_hub's own place.
        local_files_only: Never ask the network. `HF_HUB_OFFLINE=1` does the same.
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def at(self, revision: str | None) -> Self:
        """The same options at another revision: those of the main branch for None."""
        return replace(self, revision=revision)


@dataclass(frozen=True)
class PushTarget:
    """A repository on the hub to upload to.

    Attributes:
        repo_id: `owner/name`, or a name alone for one of the token's owner.
        private: Whether it is made private, where it is made; None for what its owner has as default.
        revision: Branch, which is made where it is not there; None for the main one.
        token: What to log in with; None for the one that is stored here.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
