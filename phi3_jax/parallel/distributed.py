"""Many hosts: one process on each, started together, held to the same settings, fed and read.

Every process runs the same program on its own devices. What they must agree on goes through the
coordinator's key-value store, which needs no device; only `to_host` gathers over the devices.
"""

import importlib.util
import itertools
import json
import logging
import math
import os
import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Array, Int32, PyTree, Shaped

from phi3_jax.system.buckets import bucket
from phi3_jax.system.compat_jax import distributed_state, on_cloud_tpu
from phi3_jax.system.errors import InputError
from phi3_jax.system.files import StorageError
from phi3_jax.system.packages import package_versions
from phi3_jax.system.text import first_line

logger = logging.getLogger(__name__)

ADDRESS, COUNT, ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TIMEOUT = "JAX_INITIALIZATION_TIMEOUT"  # seconds; ours, named after the argument of jax.distributed.initialize
# What `srun` tells each task; in a batch script itself the list of the step's nodes is missing.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
PATIENCE = 3600.0  # seconds that processes wait for one another: loading may take one of them long

_GATHERED = 2**26  # bytes that all processes exchange over their devices at a time

_rounds = itertools.count()  # of messages; the same in every process, since all take part in each


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float | None = None,
) -> None:
    """Starts `jax.distributed` where this process is one of several, before anything touches a device.

    Does nothing where it is alone, or started already. Settings are the arguments or else the
    variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; without any of them JAX
    finds its own on TPU VMs, SLURM (of tasks that `srun` started) and GKE, see `detect_cluster`. A
    process takes all of its host's devices, but for GPUs under SLURM, where JAX gives each task one;
    JAX_LOCAL_DEVICE_IDS (such as `0,1`) says otherwise.

    Args:
        coordinator_address: `host:port` of process 0, a port that is free there.
        num_processes: how many there are.
        process_id: which of them this is, from 0.
        timeout: seconds to wait for all of them; by default JAX_INITIALIZATION_TIMEOUT, or 300.

    Raises:
        InputError: where some settings are given and others not, where they are no numbers or out of range, and where
            not all processes come together in time.
    """
    if jax.distributed.is_initialized():
        return
    address = coordinator_address or os.environ.get(ADDRESS)
    count = _whole(COUNT) if num_processes is None else num_processes
    index = _whole(ID) if process_id is None else process_id
    seconds = _seconds() if timeout is None else timeout
    given = {ADDRESS: address, COUNT: count, ID: index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        cluster = detect_cluster()
        if cluster is not None:
            _start(
                jax.distributed.initialize, seconds, f"{cluster}: not all processes of the job reached the first one's"
            )
    elif missing:
        there = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        raise InputError(
            f"{there} given without {' and '.join(missing)}; several processes need all three, and a single one none"
        )
    else:
        assert address is not None
        assert count is not None
        assert index is not None
        _start_explicit(address, count, index, seconds)


def _start_explicit(address: str, count: int, index: int, seconds: float) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"{ADDRESS} is {address!r}, expected host:port of process 0")
    if not 0 <= index < count:
        raise InputError(f"{ID} is {index} of {COUNT} {count}, expected 0 to {count - 1}; every process has its own")
    if count == 1:
        return
    # Deactivated, or JAX would ask a cluster that it finds for what is not given here, its devices.
    start = partial(
        jax.distributed.initialize,
        coordinator_address=address,
        num_processes=count,
        process_id=index,
        cluster_detection_method="deactivate",
    )
    _start(start, seconds, f"process {index}: not all {count} processes reached the coordinator at {address}")


def _start(start: Callable[..., None], seconds: float, failure: str) -> None:
    """`jax.distributed.initialize`, given up after `seconds`.

    In a thread: JAX itself would end the process with a stack trace where the others do not come.
    """
    errors: list[Exception] = []

    def connect() -> None:
        try:
            start(initialization_timeout=math.ceil(seconds) + 60)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise InputError(
            f"{failure} within {seconds:g} s; start them all, with one address whose port is open between the hosts, "
            f"or raise {TIMEOUT}"
        )
    if not errors:
        return
    if isinstance(errors[0], jax.errors.JaxRuntimeError | ValueError | OSError):
        raise InputError(f"{failure} ({first_line(errors[0])}); see to its settings and port") from errors[0]
    raise errors[0]


def detect_cluster() -> str | None:
    """`SLURM`, `GKE`, `TPU VM` or `Kubernetes` where that started this process as one of several, else None.

    Told from what the environment already says: no waiting for a network that a laptop does not have.
    On a TPU VM it is left to JAX, and to the metadata server that is there, how many hosts there are.
    """
    environment = os.environ
    if all(name in environment for name in SLURM):
        # Tasks of this step: a shell in an allocation for several is alone.
        tasks = _whole("SLURM_STEP_NUM_TASKS") or _whole("SLURM_NTASKS") or 1
        return "SLURM" if tasks > 1 else None
    platforms = jax.config.jax_platforms or "tpu"  # type: ignore[attr-defined]
    if on_cloud_tpu() and "tpu" in platforms:
        workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
        if workers is not None:
            return "GKE" if "," in workers or (_whole("MEGASCALE_NUM_SLICES") or 1) > 1 else None
        return None if "TPU_SKIP_MDS_QUERY" in environment else "TPU VM"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if importlib.util.find_spec("kubernetes") is not None:
            return "Kubernetes"
        logger.warning(
            "this pod is of an indexed Job, but runs by itself: to run with the others, install `kubernetes`, or set "
            f"{ADDRESS}, {COUNT} and {ID}"
        )
    return None


def _whole(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise InputError(f"{name} is {text!r}, expected a whole number")
    return int(text)


def _seconds() -> float:
    text = os.environ.get(TIMEOUT, "300")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f"{TIMEOUT} is {text!r}, expected a number of seconds")
    return seconds


# What processes say to one another.


def is_main() -> bool:
    """Whether this is the process that writes files and logs: the first of several, or the only one."""
    return distributed_state().process_id == 0


def barrier(name: str, *, timeout: float = PATIENCE) -> None:
    """Waits until every process has come here.

    Args:
        name: the same in all.
        timeout: seconds.

    Raises:
        TimeoutError: where one does not come.
        RuntimeError: where one is at another barrier.
    """
    names = exchange(name, timeout=timeout)
    if set(names) != {name}:
        raise RuntimeError(f"the processes are at different barriers: {', '.join(names)}")


def exchange(text: str, *, timeout: float = PATIENCE) -> list[str]:
    """Every process's `text`, by process; all must take part.

    Raises:
        TimeoutError: where one does not in `timeout` seconds.
    """
    state = distributed_state()
    if state.client is None:
        return [text]
    place = f"phi3_jax/{next(_rounds)}"
    state.client.key_value_set(f"{place}/{state.process_id}", text)
    answers = []
    for process in range(state.num_processes):
        try:
            answers.append(state.client.blocking_key_value_get(f"{place}/{process}", math.ceil(timeout * 1000)))
        except jax.errors.JaxRuntimeError as error:
            raise TimeoutError(f"process {process} did not answer within {timeout:g} s; see its log") from error
    return answers


# An error's kind in one process, and what the others raise for it.
_KINDS = {"storage": StorageError, "input": InputError, "other": Exception}
_RAISED = {"storage": StorageError, "input": InputError, "other": RuntimeError}


@contextmanager
def together() -> Iterator[None]:
    """What the block raises in one process is raised in all, so that none waits for one that has left.

    Within it processes must not wait for one another. The process that failed raises its own error;
    the others raise `StorageError` or `InputError` where it was one, else `RuntimeError`, that names the
    process.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    kind = "" if error is None else next(name for name, cls in _KINDS.items() if isinstance(error, cls))
    answers = [json.loads(answer) for answer in exchange(json.dumps([kind, " ".join(str(error).split())]))]
    if error is not None:
        raise error
    for process, (kind, text) in enumerate(answers):
        if kind:
            raise _RAISED[kind](f"process {process} failed: {text}")


def check_agreement(what: Mapping[str, str]) -> None:
    """Compares all processes' `what`, their versions, and how many devices they have.

    Args:
        what: a name for each thing to compare, such as `configuration`, and its text or fingerprint.

    Raises:
        InputError: in every process where one differs: what, in which process, and how.
    """
    versions = {"Python": platform.python_version(), **package_versions("phi3_jax", "jax", "jaxlib")}
    _compare({**versions, **what})
    # By itself: to count devices is to start them, which processes of other versions may not survive.
    _compare({"number of local devices": str(jax.local_device_count())})


def _compare(what: Mapping[str, str]) -> None:
    answers = [json.loads(answer) for answer in exchange(json.dumps(dict(what)))]
    problems = []
    for name in dict.fromkeys(itertools.chain.from_iterable(answers)):
        values = [answer.get(name, "") for answer in answers]
        others = [process for process, value in enumerate(values) if value != values[0]]
        if others:
            first, other = _difference(values[0], values[others[0]])
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            problems.append(f"{name}: {first!r} in process 0, {other!r} in process {others[0]}{more}")
    if problems:
        raise InputError(f"the processes disagree on {'; '.join(problems)}; start them all with the same")


def _difference(one: str, other: str) -> tuple[str, str]:
    """The first lines in which two texts differ, cut to a bearable length."""
    pairs = itertools.zip_longest(one.splitlines(), other.splitlines(), fillvalue="")
    first, second = next((pair for pair in pairs if pair[0] != pair[1]), (one, other))
    return first.strip()[:80], second.strip()[:80]


# What goes to the devices, and comes from them.


def local_rows(sharding: NamedSharding, shape: Sequence[int]) -> tuple[int, ...]:
    """Which rows (axis -2) of a batch of the global `shape` this process's devices hold, ascending.

    They need not be neighbours: a mesh follows the wires between chips.
    """
    indices = sharding.addressable_devices_indices_map(tuple(shape)).values()
    held = {index[-2].indices(shape[-2]) for index in indices if index is not None}
    return tuple(sorted({row for bounds in held for row in range(*bounds)}))


def place(
    batch: Mapping[str, Int32[np.ndarray, "*steps rows seq"]], sharding: NamedSharding, batch_size: int
) -> dict[str, Int32[Array, "*steps batch seq"]]:
    """The global batch, of which every process gives the rows that it holds (`local_rows`), whole.

    A device gets its rows, and its positions of them.

    Args:
        batch: this process's rows, by name.
        sharding: that of every array in the batch.
        batch_size: rows of the global batch.
    """
    if jax.process_count() == 1:
        placed: dict[str, Array] = jax.device_put(dict(batch), sharding)
        return placed
    return {name: _place(array, sharding, batch_size) for name, array in batch.items()}


def _place(array: np.ndarray, sharding: NamedSharding, batch_size: int) -> Array:
    shape = (*array.shape[:-2], batch_size, array.shape[-1])
    rows = local_rows(sharding, shape)
    assert len(rows) == array.shape[-2], f"{array.shape[-2]} rows, but this process holds {rows} of {batch_size}"

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[-2].indices(batch_size)
        first = rows.index(start)
        return array[(*index[:-2], slice(first, first + stop - start), index[-1])]

    return jax.make_array_from_callback(shape, sharding, piece)


def to_host(tree: PyTree) -> PyTree:
    """The tree with numpy arrays in place of jax's, whole, in every process; all must take part."""

    def fetch(array: Array | np.ndarray) -> np.ndarray:
        if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(fetch, tree)


def joined(own: Shaped[np.ndarray, "own"]) -> Shaped[np.ndarray, "all"]:
    """Every process's array, one behind the other, in every process; all must take part.

    As bytes, since devices would round what has 64 bits, and in pieces: no more than 64 MiB lie on a device at once.
    """
    count = distributed_state().num_processes
    if count == 1:
        return own
    content = np.ascontiguousarray(own).view(np.uint8)
    sizes = [int(size) for size in exchange(str(content.size))]
    starts = np.cumsum([0, *sizes])
    result = np.empty(starts[-1], np.uint8)
    piece = min(bucket(max(sizes), least=2**10, doubling=2**26), _GATHERED // count)
    for begin in range(0, max(sizes), piece):
        sent = np.zeros(piece, np.uint8)
        part = content[begin : begin + piece]
        sent[: len(part)] = part
        for process, received in enumerate(np.asarray(multihost_utils.process_allgather(sent))):
            held = max(0, min(piece, sizes[process] - begin))
            result[starts[process] + begin :][:held] = received[:held]
    return result.view(own.dtype)
