"""The train step compiled in a thread while the weights are read: a compiler needs their shapes alone."""

from collections.abc import Callable
from concurrent.futures import Future

import jax
from jax.stages import Compiled
from jaxtyping import PyTree

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.data.batch import Batch
from phi3_jax.parallel.devices import Devices
from phi3_jax.peft.adapter import PeftAdapter
from phi3_jax.system.leaving import begin
from phi3_jax.system.telling import taking, tell
from phi3_jax.training.abstract import AbstractStep, abstract_step
from phi3_jax.training.step import Params, TrainState


class StepAhead:
    """A step that is being compiled, for whoever comes to need it.

    Args:
        length: Positions of its rows.
        make: Gives the step of shapes.
    """

    def __init__(self, length: int, make: Callable[[], AbstractStep]) -> None:
        self._length, self._make = length, make
        self._made: Future[tuple[AbstractStep, Compiled]] = Future()
        begin(self._compile, "compiling the train step")

    def _compile(self) -> None:
        try:
            step = self._make()
            with taking("compiling the train step"):
                self._made.set_result((step, step.compile()))
        except BaseException as error:
            self._made.set_exception(error)

    def __call__(self, state: TrainState, frozen: Params, batch: Batch) -> Compiled | None:
        """The program, once it is there; None where these arguments are not those that it was made for.

        Raises:
            Exception: What the compiler raised.
        """
        if batch["input_ids"].shape[-1] != self._length:
            return None  # rows are not packed, and these are of another length
        step, program = self._made.result()
        if _are_alike((state, frozen, batch), (step.state, step.frozen, step.batch)):
            return program
        tell("the train step is compiled anew, since what was loaded differs from what its settings let expect")
        return None


def step_ahead(
    run: RunConfig,
    config: Phi3Config,
    devices: Devices,
    *,
    total_steps: int,
    length: int | None,
    adapter: PeftAdapter | None = None,
) -> StepAhead | None:
    """The step of a run, begun to be compiled; None where its shapes cannot be told beforehand.

    Args:
        run: The run.
        config: The checkpoint's.
        devices: Those of the run.
        total_steps: Over which the learning rate has its course.
        length: Positions of a row; None where nobody knows.
        adapter: That of `peft.init_from`.
    """
    if length is None or run.peft.init_lora_weights == "eva":  # EVA gives each layer a rank of its own, by the data
        return None

    def make() -> AbstractStep:
        return abstract_step(run, config, devices.mesh, total_steps=total_steps, length=length, adapter=adapter)

    return StepAhead(length, make)


def _are_alike(given: PyTree, foreseen: PyTree) -> bool:
    """Whether arrays are of the structure, the shapes, the types and the places of these shapes."""
    structures: list[object] = [jax.tree.structure(tree) for tree in (given, foreseen)]
    return structures[0] == structures[1] and all(
        array.shape == shape.shape
        and array.dtype == shape.dtype
        and array.sharding.is_equivalent_to(shape.sharding, len(shape.shape))
        for array, shape in zip(jax.tree.leaves(given), jax.tree.leaves(foreseen), strict=True)
    )
