"""YAML with a word about each setting."""

import yaml

from phi3_jax.config.commented import commented_yaml
from phi3_jax.config.run import RunConfig

SETTINGS = {
    "model.name_or_path": "a: b #c",
    "data.train": "na\u00efve.jsonl",
    "data.literal_roles": ["user"],
    "data.columns": {"prompt": "q"},
    "training.learning_rate": 2e-4,
    "training.save_strategy": "no",
    "training.load_best_model_at_end": False,
}


def test_it_is_read_as_what_was_meant():
    why = {"data.train": "rows", "data.literal_roles": "x" * 200, "data.columns": "y"}
    text = commented_yaml(SETTINGS, why, ["first: #", "", "second"])
    raw = yaml.safe_load(text)
    assert {f"{section}.{key}": value for section, keys in raw.items() for key, value in keys.items()} == SETTINGS
    assert RunConfig.from_dict(raw).training.save_strategy == "no"
    assert text.startswith("# first: #\n#\n# second\nmodel:\n")
    assert "  train: na\u00efve.jsonl  # rows\n" in text
    assert f"  # {'x' * 200}\n  literal_roles:\n" in text
