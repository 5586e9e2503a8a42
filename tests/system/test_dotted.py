import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from phi3_jax.system.dotted import dotted, flat_items, last_part, nested, path_names, sibling


def test_a_sibling_differs_in_the_last_part():
    assert sibling("a.b.c", "d") == sibling("a.b.c", "e.d") == "a.b.d"


def test_nested_and_flat_items_are_each_others_reverse():
    flat = {"model.layers.mlp.up": 1, "lm_head": 2, "model.embed": 3, "model.layers.attn": 4}
    tree = nested(flat)
    assert tree == {"model": {"layers": {"mlp": {"up": 1}, "attn": 4}, "embed": 3}, "lm_head": 2}
    assert dict(flat_items(tree)) == flat
    assert nested({}) == {}


@pytest.mark.parametrize(("name", "last"), [("a.b.c", "c"), ("c", "c"), ("", "")])
def test_last_part(name, last):
    assert last_part(name) == last


def test_the_parts_of_a_leafs_path_are_those_that_jax_writes():
    """Attributes, keys that are dotted themselves, and indices; a variable's `value` is no name."""
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    tree = {"model": state, "saved": {"model.lm_head": jnp.zeros(1)}, "parts": (jnp.zeros(1),)}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    written = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path in paths]
    assert [dotted(path_names(path)) for path in paths] == written
    assert written == ["model.bias", "model.kernel", "parts.0", "saved.model.lm_head"]
