"""Steps of shapes in place of arrays."""


def test_the_formats_of_quantised_weights():
    import jax
    import jax.numpy as jnp
    import numpy as np

    from phi3_jax.performance.abstract import abstract_quantized
    from phi3_jax.quant.quantize import make_quantizer, stack_layers

    rng = np.random.default_rng(0)
    for shape in ((6, 128), (6, 33)):  # blocks along rows, and flat ones
        weights = rng.normal(size=(2, *shape)).astype(np.float32)
        for kind, double_quant in (("nf4", True), ("nf4", False), ("int8", True)):
            quantizer = make_quantizer(kind, double_quant=double_quant)
            path = ("model", "layers", "mlp", "down_proj", "weight")
            real = stack_layers((quantizer("down_proj", w) for w in weights), 2, path, np.empty)
            whole = jax.ShapeDtypeStruct(weights.shape, jnp.float32)
            abstract = abstract_quantized(whole, kind, double_quant=double_quant)
            assert jax.tree.structure(abstract) == jax.tree.structure(real)
            assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
                (x.shape, x.dtype) for x in jax.tree.leaves(real)
            ]
            assert abstract.shape == real.shape
