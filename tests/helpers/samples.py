"""The dictionaries that stand in examples/, read without running anything."""

import ast
import json
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"


def code_of(name: str) -> str:
    """The code of a script, or of a notebook's cells without their shell lines."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    if not name.endswith(".ipynb"):
        return text
    cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return "\n".join(cell.replace("    !", "    pass  # ") for cell in cells)


def sample_dictionary(name: str, variable: str) -> dict[str, Any]:
    """A dictionary's entries, names of other values written out; what is computed is left out."""
    known: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for node in ast.parse(code_of(name)).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        target = node.targets[0].id
        if isinstance(node.value, ast.Dict):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            entries = {key.value: _value(value, known) for key, value in pairs if isinstance(key, ast.Constant)}
            known[target] = {key: value for key, value in entries.items() if value is not ...}
            found = known[target] if target == variable else found
        elif (value := _value(node.value, known)) is not ...:
            known[target] = value
    assert found, f"{name} has no {variable}"
    return found


def _value(node: ast.expr, known: dict[str, Any]) -> Any:
    """What an expression is, `...` where that takes running it."""
    if isinstance(node, ast.Name):
        return known.get(node.id, ...)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ...
