"""A run on the devices that are here: the axes of the mesh that `parallel: auto` stands for."""

from dataclasses import replace

import jax

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.hf.files import CONFIG
from phi3_jax.peft.continued import as_trained, open_run_base
from phi3_jax.performance.choose import with_chosen_axes
from phi3_jax.performance.memory import Estimator
from phi3_jax.performance.plan import as_stored
from phi3_jax.performance.topology import topology_of
from phi3_jax.system.telling import tell


def with_axes(run: RunConfig, config: Phi3Config | None = None) -> RunConfig:
    """The run with axes in place of `parallel: auto`, for all devices of JAX, and a line that says why.

    Any other run is given back as it is.

    Args:
        run: Whose checkpoint's config.json is read, or downloaded.
        config: The model's shape, in place of the checkpoint's.

    Raises:
        InputError: No axes go with model, rows and devices.

    Example:
        >>> from phi3_jax import RunConfig
        >>> run = RunConfig.from_dict({"model": "base", "parallel": {"fsdp": 2}})
        >>> with_axes(run) is run
        True
    """
    if run.parallel.axes != "auto":
        return run
    stored = run
    if config is None:
        checkpoint = open_run_base(run, patterns=(CONFIG,))
        stored = as_stored(as_trained(run, checkpoint)[0], checkpoint)
        config = checkpoint.config
    chosen, lines = with_chosen_axes(stored, topology_of(jax.devices()), Estimator(config))
    if run.logging.verbosity != "quiet":
        for line in lines:
            tell(line)
    return replace(run, parallel=chosen.parallel)
