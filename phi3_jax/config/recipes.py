"""Recipes: the configurations of runs that the package brings along, found by name.

They are the files of the repository's `configs/`; an installed package has them in its folder `recipes`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from phi3_jax.config.names import nearest
from phi3_jax.config.parse import Raw, read_yaml
from phi3_jax.config.run import RunConfig, parse_run_config
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import read_text

PACKAGE = Path(__file__).parents[1]
FOLDER = (PACKAGE / "recipes").resolve()

# Keys whose values may be files of the package, written as in a clone: phi3_jax/demo/base.
_FILES = {"model": ("name_or_path",), "data": ("train", "eval")}


@dataclass(frozen=True)
class Recipe:
    """One of them, for a list.

    Attributes:
        name: What `--config` takes.
        title: What it is, in a line.
        run: Its configuration.
        needs: The device that it fits on.
    """

    name: str
    title: str
    run: RunConfig
    needs: str

    @property
    def model(self) -> str:
        """The base, in a word or two."""
        path = Path(self.run.model.name_or_path)
        return "built in" if path.is_relative_to(PACKAGE) else path.name

    @property
    def method(self) -> str:
        """How it trains, in a few words."""
        model, peft = self.run.model, self.run.peft
        if peft.full_finetuning:
            return "every weight"
        kind = "DoRA" if peft.use_dora else "LoRA"
        return f"{kind} r {peft.r}{f', {model.quantization}' if model.quantization else ''}"


def recipe_names() -> list[str]:
    """The names of all recipes."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """The file, to be copied: paths of the package are written out.

    Args:
        name: With or without `.yaml`.

    Raises:
        InputError: There is none of that name.

    Example:
        >>> recipe_text("phi3_mini_4k_lora").splitlines()[0]
        "# LoRA on Phi-3-mini-4k-instruct: the recipe of Microsoft's sample_finetune.py."
    """
    stem = name.removesuffix(".yaml")
    if stem not in recipe_names():
        raise InputError(f"there is no recipe {name}{_meant(stem)}; `phi3-jax recipes` lists them")
    text = read_text(FOLDER / f"{stem}.yaml")
    return re.sub(rf"(?<=: ){PACKAGE.name}/", lambda _: f"{PACKAGE}/", text)


def recipe(name: str) -> Recipe:
    """A recipe, for a list. Raises `InputError` where there is none of that name."""
    text = recipe_text(name)
    title = re.search(r"^# (?:.*?: )?(.+?)\.?$", text, re.MULTILINE)
    needs = re.search(r"Needs: (?:[\d.]+ GB [^:]*: )?([^.;]+)", text)
    stem = name.removesuffix(".yaml")
    run, _ = parse_run_config(read_recipe(stem))
    return Recipe(stem, title[1] if title else stem, run, needs[1] if needs else "")


def read_recipe(name: str) -> Raw:
    """What a recipe says, paths of the package written out.

    Example:
        >>> read_recipe("phi3_mini_4k_qlora")["model"]["quantization"]
        'nf4'
    """
    raw = read_yaml(FOLDER / f"{name}.yaml")
    for section, keys in _FILES.items():
        values = raw.get(section)
        if isinstance(values, dict):
            for key in keys:
                if str(values.get(key)).startswith(f"{PACKAGE.name}/"):
                    values[key] = str(PACKAGE.parent / values[key])
    return raw


def read_config(name: str) -> tuple[Raw, str | None]:
    """What a file, or the recipe of that name, says of a run; and a line about which of them it is, if it needs one.

    A file wins, if it has the very name that is given; where a recipe is named and its copy is here, too, one has to
    say which is meant.

    Raises:
        InputError: There is neither, or it cannot be read.
    """
    stem = name.removesuffix(".yaml")
    is_recipe = stem in recipe_names()
    if Path(name).expanduser().is_file():
        line = f"--config {name}: this file, not the packaged recipe of that name" if is_recipe else None
        return read_yaml(name), line
    if not is_recipe:
        _refuse(name, stem)
        return read_yaml(name), None
    if Path(f"{stem}.yaml").is_file():
        raise InputError(
            f"--config {name} may mean the packaged recipe, or {stem}.yaml here; write {stem}.yaml for the file, or "
            "rename it"
        )
    return read_recipe(stem), f"--config {name}: the packaged recipe; `phi3-jax recipes {stem}` prints it"


def _refuse(name: str, stem: str) -> None:
    """Raises `InputError` for a name that is no file and no recipe, where it looks like one of the latter."""
    base = Path(stem).name
    if base in recipe_names():  # configs/NAME.yaml, where there is no such folder
        raise InputError(f"{name}: there is no such file here; --config {base} takes the packaged recipe of that name")
    if "/" not in name and not Path(name).expanduser().exists():
        copy = f"; did you mean {name}.yaml, which is here" if Path(f"{name}.yaml").is_file() else _meant(stem)
        raise InputError(
            f"--config {name}: no such file, and no recipe of that name{copy}; `phi3-jax recipes` lists them"
        )


def _meant(stem: str) -> str:
    known = recipe_names()
    found = nearest(stem, known) if known else None
    return f"; did you mean {found}" if found else ""
