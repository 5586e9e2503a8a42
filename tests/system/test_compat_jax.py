"""The insides of JAX are still as this package takes them to be."""

import inspect

import jax
import jax.numpy as jnp
import pytest

from phi3_jax.system.compat_jax import add_gradients, distributed_state, on_cloud_tpu


def test_a_process_alone_has_a_number_and_no_store():
    state = distributed_state()
    assert (state.process_id, state.num_processes) == (0, 1)
    assert state.client is None
    assert state.preemption_sync_manager is None


def test_the_store_of_several_processes_has_the_methods_that_are_called():
    from jax._src.lib import _jax

    client = _jax.DistributedRuntimeClient
    assert callable(client.key_value_set)
    assert "timeout_in_ms" in (inspect.getdoc(client.blocking_key_value_get) or "")


def test_this_is_no_cloud_tpu():
    assert on_cloud_tpu() is False


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_added_to_what_was_there(compiled):
    def summed(x):
        def loss(params):
            carry, _ = jax.lax.scan(lambda c, w: (jnp.tanh(w * c), None), x, params["w"])
            return carry * params["b"]

        params = {"w": jnp.array([0.5, 2.0]), "b": jnp.float32(3.0)}
        sums = jax.tree.map(lambda p: jax.new_ref(jnp.ones_like(p)), params)
        _, backward = jax.vjp(loss, params)
        add_gradients(backward, sums, jnp.float32(2.0))
        expected = jax.tree.map(lambda g: 1 + 2 * g, jax.grad(loss)(params))
        return jax.tree.map(lambda ref: ref[...], sums), expected

    found, expected = (jax.jit(summed) if compiled else summed)(jnp.float32(0.7))
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b), found, expected))
