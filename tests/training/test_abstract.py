"""Steps of shapes in place of arrays."""


def test_the_formats_of_quantised_weights():
    import jax
    import jax.numpy as jnp
    import numpy as np

    from phi3_jax.quant.quantize import make_quantizer, stack_layers
    from phi3_jax.training.abstract import abstract_quantized

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


def test_codes_lie_as_the_mesh_s_devices_have_them():
    from phi3_jax import Phi3Config
    from phi3_jax.config.run import RunConfig
    from phi3_jax.performance.topology import abstract_mesh, parse_topology
    from phi3_jax.quant import NF4Weight
    from phi3_jax.training.abstract import abstract_step
    from tests.helpers.models import QUANTIZABLE

    config = Phi3Config.from_dict({**QUANTIZABLE, "intermediate_size": 256})
    run = RunConfig.from_dict({"model": {"name_or_path": "x", "quantization": "nf4", "attention": "chunked"}})
    for device, by_halves in (("v5e:1x1", True), ("gpu:l4", False)):
        step = abstract_step(run, config, abstract_mesh(run, parse_topology(device)))
        weight = step.frozen["model"]["model"]["layers"]["mlp"]["down_proj"]["weight"].get_value()
        assert isinstance(weight, NF4Weight)
        assert weight.by_halves is by_halves


def test_what_a_checkpoint_quantises_in_some_layers_only_is_dense():
    from phi3_jax import Phi3Config
    from phi3_jax.config.run import RunConfig
    from phi3_jax.quant import NF4Weight
    from phi3_jax.training.abstract import abstract_model_and_lora
    from tests.helpers.models import QUANTIZABLE

    skipped = {"llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp.down_proj"]}
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **skipped}
    config = Phi3Config.from_dict({**QUANTIZABLE, "quantization_config": section})
    run = RunConfig.from_dict({"model": {"name_or_path": "x", "quantization": "nf4"}})
    model, _ = abstract_model_and_lora(run, config, split=False)
    assert isinstance(model.model.layers.mlp.gate_up_proj.weight.get_value(), NF4Weight)
    assert model.model.layers.mlp.down_proj.weight.get_value().dtype == "bfloat16"
