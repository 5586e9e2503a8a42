"""The base of an adapter, and its revision: written by training, and taken from there by whatever loads the adapter."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phi3_jax import InputError, Phi3ForCausalLM, load_adapter
from phi3_jax.cli import main
from phi3_jax.config.hub_options import Hub
from phi3_jax.evaluate import evaluate
from phi3_jax.peft.adapter import PeftAdapter
from phi3_jax.peft.base import open_base
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.commands import after_device
from tests.helpers.rows import write_chats

NAME, TABLE = "org/base", "model.embed_tokens.weight"
COMMITS = {"main": "b" * 40, "april": "a" * 40}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A hub's cache with two revisions of a base, rows, and a run on the older one."""
    folder = tmp_path_factory.mktemp("revisions")
    repository = folder / "cache" / "models--org--base"
    (repository / "refs").mkdir(parents=True)
    write_checkpoint(folder / "base")
    for number, (revision, commit) in enumerate(COMMITS.items(), 1):
        (repository / "refs" / revision).write_text(commit)
        snapshot = shutil.copytree(folder / "base", repository / "snapshots" / commit)
        weights = load_file(snapshot / "model.safetensors")
        save_file({name: x * number for name, x in weights.items()}, snapshot / "model.safetensors", {"format": "pt"})
    write_chats(folder / "chats.jsonl", number=4)
    assert main(train(folder, "out", "--model.revision=april")) == 0
    return folder


def train(folder: Path, output: str, *more: str, base: object = NAME) -> list[str]:
    options = {
        "model.name_or_path": base,
        "model.cache_dir": folder / "cache",
        "model.local_files_only": True,
        "model.dtype": "float32",
        "peft.r": 2,
        "data.train": folder / "chats.jsonl",
        "data.max_length": 32,
        "training.output_dir": folder / output,
        "training.max_steps": 2,
        "training.save_steps": 1,
        "training.learning_rate": 0.05,
        "training.warmup_ratio": 0,
        "logging.progress": False,
        "logging.tensorboard": False,
    }
    return ["train", *(f"--{name}={value}" for name, value in options.items()), *more]


def hub(world: Path, revision: str | None = None) -> Hub:
    return Hub(revision, cache_dir=world / "cache", local_files_only=True)


def hub_options(world: Path) -> list[str]:
    return ["--cache_dir", str(world / "cache"), "--local_files_only"]


def snapshot(world: Path, revision: str) -> Path:
    return world / "cache" / "models--org--base" / "snapshots" / COMMITS[revision]


def written(adapter: Path) -> dict[str, object]:
    return json.loads((adapter / "adapter_config.json").read_text())


def with_entries(adapter: Path, target: Path, **entries: object) -> Path:
    """A copy of an adapter whose configuration says something else."""
    shutil.copytree(adapter, target)
    (target / "adapter_config.json").write_text(json.dumps(written(adapter) | entries))
    return target


def test_the_revision_stands_in_the_adapters_file_and_on_its_card(world):
    adapter = world / "out" / "adapter"
    assert written(adapter)["base_model_name_or_path"] == NAME
    assert written(adapter)["revision"] == "april"
    assert (adapter / "README.md").read_text().count("revision='april'") == 2
    config = PeftAdapter.open(adapter).config
    assert (config.base_model_name_or_path, config.revision) == (NAME, "april")


@pytest.mark.parametrize("case", ["no revision", "a folder", "another name"])
def test_no_revision_where_none_was_given_or_the_base_has_none(case, world, tmp_path):
    more, base = {
        "no revision": ([], NAME),
        "a folder": (["--model.revision=april"], world / "base"),
        "another name": (["--model.revision=april", "--peft.base_model_name_or_path=org/other"], NAME),
    }[case]
    assert main(train(world, str(tmp_path / "out"), *more, base=base)) == 0
    assert written(tmp_path / "out" / "adapter")["revision"] is None
    assert "revision=" not in (tmp_path / "out" / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("folder", [pytest.param("adapter", marks=pytest.mark.slow), "checkpoints/1"])
def test_peft_loads_adapters_and_checkpoints_with_the_base_at_that_revision(folder, world):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(
        world / "out" / folder, cache_dir=world / "cache", local_files_only=True, dtype=torch.float32
    )
    table = model.get_base_model().model.embed_tokens.weight.detach().numpy()
    assert np.array_equal(table, load_file(snapshot(world, "april") / "model.safetensors")[TABLE])
    ours = Phi3ForCausalLM.from_pretrained(snapshot(world, "april"), dtype=jnp.float32)
    ids = np.random.default_rng(0).integers(5, ours.config.vocab_size, (2, 9))
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    lora = load_adapter(world / "out" / folder, ours)
    np.testing.assert_allclose(np.asarray(ours(jnp.asarray(ids), lora=lora)), theirs, atol=2e-5, rtol=1e-4)
    assert not np.allclose(np.asarray(ours(jnp.asarray(ids))), theirs, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "revision"),
    [
        ([], "april"),
        (["--base", NAME], "april"),
        (["--model", NAME, "--revision", "main"], "main"),
        (["--revision", "main"], "main"),
        (["--base", "FOLDER"], "base"),
    ],
)
def test_a_merge_is_into_the_base_that_was_trained_on_unless_told_otherwise(world, tmp_path, capfd, options, revision):
    options = [str(world / "base") if option == "FOLDER" else option for option in options]
    argv = ["export", str(world / "out/adapter"), "--merge", "--output", str(tmp_path / "merged")]
    assert main([*argv, *hub_options(world), *options]) == 0
    folder = world / "base" if revision == "base" else snapshot(world, revision)
    # The adapter is not of the table, which is the base's own.
    expected = load_file(folder / "model.safetensors")[TABLE]
    assert np.array_equal(load_file(tmp_path / "merged" / "model.safetensors")[TABLE], expected)
    said = capfd.readouterr().err
    assert ("base: org/base at revision april, which" in said) is (revision == "april")


def test_a_portable_adapter_keeps_the_revision(world, tmp_path):
    argv = ["export", str(world / "out/adapter"), "--portable", "--output", str(tmp_path / "plain")]
    assert main([*argv, *hub_options(world)]) == 0
    assert written(tmp_path / "plain")["revision"] == "april"


def test_generate_takes_the_base_from_the_adapter_and_says_so(world, capfd):
    argv = ["generate", "--adapter", str(world / "out/adapter"), "--raw", "--prompt", "a", "--max-new-tokens", "2"]
    assert main([*argv, *hub_options(world), "--json"]) == 0
    said = capfd.readouterr()
    assert after_device(said.err) == f"base: org/base at revision april, which {world / 'out/adapter'} was trained on\n"
    assert main([*argv, "--model", str(snapshot(world, "april")), "--json"]) == 0
    expected = capfd.readouterr()
    assert json.loads(said.out)["tokens"] == json.loads(expected.out)["tokens"]
    assert after_device(expected.err) == ""


def test_evaluate_takes_the_base_from_the_adapter(world):
    settings = {"adapters": {"one": world / "out/adapter"}, "dtype": "float32"}

    def loss(model: object, **more: object) -> float:
        return evaluate(model, world / "chats.jsonl", **settings, **more).models["one"]["loss"].value

    options = {"cache_dir": world / "cache", "local_files_only": True}
    at_april, at_main = loss(snapshot(world, "april")), loss(snapshot(world, "main"))
    assert at_april != at_main
    assert loss(None, **options) == loss(NAME, **options) == at_april
    assert loss(NAME, revision="main", **options) == at_main


def test_the_harness_takes_the_base_from_the_adapter(world):
    pytest.importorskip("lm_eval")
    from phi3_jax.evaluate.lm_harness import Phi3JaxLM

    arguments = f"adapter={world / 'out/adapter'},cache_dir={world / 'cache'},local_files_only=True,dtype=float32"
    model = Phi3JaxLM.create_from_arg_string(arguments).model
    expected = Phi3ForCausalLM.from_pretrained(snapshot(world, "april"), dtype=jnp.float32)
    assert jnp.array_equal(model.model.embed_tokens.weight[...], expected.model.embed_tokens.weight[...])


def test_what_is_saved_again_names_the_same_base(world, tmp_path):
    from phi3_jax import save_adapter

    model = Phi3ForCausalLM.from_pretrained(snapshot(world, "april"), dtype=jnp.float32)
    lora = load_adapter(world / "out/adapter", model)
    save_adapter(tmp_path / "same", lora)
    assert written(tmp_path / "same") == written(world / "out/adapter")
    save_adapter(tmp_path / "other", lora, base_model_name_or_path="org/other")
    assert written(tmp_path / "other")["revision"] is None


def test_adapters_that_disagree_are_refused(world, tmp_path):
    one = PeftAdapter.open(world / "out/adapter")
    newer = PeftAdapter.open(with_entries(one.folder, tmp_path / "newer", revision=None))
    other = PeftAdapter.open(with_entries(one.folder, tmp_path / "other", base_model_name_or_path="org/other"))
    nameless = PeftAdapter.open(with_entries(one.folder, tmp_path / "nameless", base_model_name_or_path=None))
    with pytest.raises(InputError, match="different revisions of org/base, april and main; give one with --revision"):
        open_base(None, [one, newer], hub(world))
    assert open_base(None, [one, newer], hub(world, "april")).folder == snapshot(world, "april")
    with pytest.raises(InputError, match="different base models, org/base and org/other; give one with --model"):
        open_base(None, [one, other], hub(world))
    assert open_base(NAME, [one, other], hub(world)).folder == snapshot(world, "april")
    with pytest.raises(InputError, match=r"adapter_config\.json: names no base model; give it with --model"):
        open_base(None, [nameless], hub(world))
    assert open_base(None, [one, nameless], hub(world)).folder == snapshot(world, "april")
    with pytest.raises(InputError, match="no model is given"):
        open_base(None, [], hub(world))


def test_a_revision_that_is_no_text_is_refused(world, tmp_path):
    adapter = with_entries(world / "out/adapter", tmp_path / "adapter", revision=["april"])
    with pytest.raises(InputError, match=r"revision is \['april'\], expected a branch, tag or commit"):
        assert PeftAdapter.open(adapter).config
