"""A door to EleutherAI's lm-evaluation-harness: the model class that its `lm_eval` runs (extra `lm-eval`)."""

from phi3_jax.system.errors import InputError

try:
    import lm_eval  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    raise InputError("lm_eval is not installed, and this needs it; pip install 'phi3_jax[lm-eval]'") from error

from phi3_jax.evaluate.lm_harness import Phi3JaxLM

__all__ = ["Phi3JaxLM"]
