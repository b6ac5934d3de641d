"""Devices and hosts: the only door to meshes and process indices.

Arrays at rest are global: replicated state, batches sharded over the mesh axis
"data". So a checkpoint does not know how many devices wrote it.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent import futures
from typing import Any, TextIO

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unet_jax.errors import UserError

# What names a cluster that JAX does not know.
_CLUSTER = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_MOST_CPUS = 4096
# How long the first process waits for the last.
_JOIN_SECONDS = 300
# How long a host that failed waits for others that fail too.
_LEAVE_SECONDS = 10
# Where a host that failed says so, and how often the others look there.
_FAILURE = "unet_jax/failure"
_LOOK_SECONDS = 2.0
# How long they go on: what failed on one host often fails on all.
_GRACE_SECONDS = 3.0
_leaving = threading.Event()


@dataclasses.dataclass(frozen=True)
class Host:
  """This process among all: `index` in 0..`count` - 1; 0 writes the files."""

  index: int
  count: int

  @property
  def is_primary(self) -> bool:
    return self.index == 0


def this_host() -> Host:
  """The index of this process and the number of processes.

  Without a cluster no device is touched for it.
  """
  if not jax.distributed.is_initialized():
    return Host(0, 1)
  return Host(jax.process_index(), jax.process_count())


def make_mesh(
  space: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Axes ("data", "space"): `space` devices share one image.

  The devices of a host are neighbours, so that a host's examples follow one
  another in the global batch on any number of hosts. Built by hand because
  `jax.make_mesh` gives explicit axis types.

  Args:
    space: devices an image; divides the devices of every host.
    devices: all of all hosts if None.

  Raises:
    UserError: a host's devices cannot be divided.
  """
  devices = sorted(
    jax.devices() if devices is None else devices,
    key=lambda device: (device.process_index, device.id),
  )
  most = len(devices) // len({d.process_index for d in devices})
  if most % space:
    nearest = max(n for n in range(1, most + 1) if most % n == 0 and n <= space)
    raise UserError(
      f"config.parallel.space={space} does not divide the {most} devices of a"
      f" host; nearest: {nearest}"
    )
  return Mesh(np.array(devices).reshape(-1, space), ("data", "space"))


def topology_devices(topology: str) -> list[jax.Device]:
  """The devices of a topology that need not be here, to compile for.

  Call it before anything touches a device: CPU devices are made on the way.

  Args:
    topology: "cpu:N", or a TPU slice as "v5e:4x4" or "v4:2x2x4" (libtpu knows
      which exist).

  Raises:
    UserError: there is none of that name, or libtpu is missing.
  """
  kind, _, shape = topology.partition(":")
  wrong = f"--topology {topology}"
  if kind == "cpu":
    if not shape.isdigit() or not 1 <= int(shape) <= _MOST_CPUS:
      raise UserError(f"{wrong}: give cpu:N with N from 1 to {_MOST_CPUS}")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(shape))
    return jax.devices()
  if not re.fullmatch(r"v\d+[a-z]?:\d+(x\d+)+", topology):
    raise UserError(f"{wrong}: give cpu:8, or a TPU slice such as v5e:4x4")
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"{wrong} needs TPU's compiler: pip install 'unet_jax[tpu]' (no TPU is"
      " needed)"
    )
  # No TPU is looked for: not here, not at a cloud's metadata server.
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  jax.config.update("jax_platforms", "cpu")
  try:
    description = topologies.get_topology_desc(
      platform="tpu", topology_name=topology
    )
  except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"{wrong}: {reason}; try v5e:2x2 or v5e:4x4") from error
  return list(description.devices)


def check_batch_size(
  batch_size: int, mesh: Mesh, key: str, accumulate: int = 1
) -> None:
  """Raises a UserError unless every device gets the same number of examples.

  Of each of `accumulate` microbatches, that is.
  """
  n = mesh.shape["data"] * accumulate
  if batch_size % n:
    nearest = max(n, round(batch_size / n) * n)
    parts = f"{n // accumulate} devices"
    if accumulate > 1:
      parts += f" in {accumulate} microbatches"
    raise UserError(
      f"config.{key}={batch_size} does not divide over {parts}; nearest:"
      f" {nearest}"
    )


def memory_bytes(mesh: Mesh) -> int | None:
  """Memory of one device; None where it is not known.

  On CPU the devices of a host share what is free.
  """
  device = mesh.local_devices[0]
  if device.platform != "cpu":
    return (device.memory_stats() or {}).get("bytes_limit")
  try:
    text = pathlib.Path("/proc/meminfo").read_text()
  except OSError:  # Not Linux.
    return None
  kilobytes = int(re.search(r"MemAvailable:\s*(\d+)", text)[1])
  return kilobytes * 1024 // len(mesh.local_devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of state: a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its first axis split over "data"."""
  return NamedSharding(mesh, PartitionSpec("data"))


def cut_images(batch: dict[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
  """Inside a jitted step: cuts [B, H, ...] over "space" too, along H.

  What is computed from it stays so; the partitioner exchanges the borders. A
  batch arrives whole, since augmentation moves pixels anywhere.
  """
  if mesh.shape["space"] == 1:
    return batch
  both = NamedSharding(mesh, PartitionSpec("data", "space"))
  return {
    name: jax.lax.with_sharding_constraint(x, both) if x.ndim > 1 else x
    for name, x in batch.items()
  }


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This host's part of a batch [b, ...] -> global arrays [B, ...]."""
  sharding = over_data(mesh)

  def put(array: np.ndarray) -> jax.Array:
    shape = (array.shape[0] * this_host().count, *array.shape[1:])
    return jax.make_array_from_process_local_data(sharding, array, shape)

  return {name: put(array) for name, array in batch.items()}


def put_stacked(
  batch: dict[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """The same as `pmap` takes it: [devices, b, ...], b of each device."""
  n = len(mesh.local_devices)
  rows = {k: x.reshape(n, -1, *x.shape[1:]) for k, x in batch.items()}
  return put_batch(rows, mesh)


def as_global(tree: Any, mesh: Mesh) -> Any:
  """What `pmap` gives whole to every device, as arrays of the mesh.

  No copy is made.
  """
  whole = replicated(mesh)

  def convert(x: jax.Array) -> jax.Array:
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, whole, shards)

  return jax.tree.map(convert, tree)


def prefetch(
  batches: Generator[dict[str, np.ndarray], None, None],
  put: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
) -> Generator[tuple[dict[str, np.ndarray], dict[str, jax.Array]], None, None]:
  """Each batch, as it came and on the devices; a thread fetches the next one.

  What fails there is raised where it is asked for. Closing closes `batches`.
  """

  def load() -> tuple[dict[str, np.ndarray], dict[str, jax.Array]] | None:
    batch = next(batches, None)
    return None if batch is None else (batch, put(batch))

  # The thread ends before `batches`, which it may be inside, is closed.
  with contextlib.closing(batches), futures.ThreadPoolExecutor(1) as pool:
    ahead = pool.submit(load)
    while (loaded := ahead.result()) is not None:
      ahead = pool.submit(load)
      yield loaded


# --- Many hosts ---------------------------------------------------------------


def start_cluster(heartbeat_seconds: int) -> None:
  """Joins the processes of a run, where the environment speaks of several.

  JAX finds its peers on TPU pods, under SLURM, Open MPI and Kubernetes; else
  JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID name
  them. Call it before anything touches a device. What this process prints then
  starts with the number of its host.

  Args:
    heartbeat_seconds: without a sign of life from another host for so long, the
      run ends.

  Raises:
    UserError: the variables are not complete, or the others do not come.
  """
  if not in_cluster():
    return
  named = [os.environ.get(name) for name in _CLUSTER]
  options = {}
  if any(named):
    address, count, index = named
    if not (address and (count or "").isdigit() and (index or "").isdigit()):
      raise UserError(
        f"{', '.join(_CLUSTER)} name a cluster together, but are {named}; set"
        " all three (HOST:PORT, a count, an index from 0), or none"
      )
    options = {
      "coordinator_address": address,
      "num_processes": int(count),
      "process_id": int(index),
    }
  try:
    jax.distributed.initialize(
      **options,
      heartbeat_timeout_seconds=heartbeat_seconds,
      initialization_timeout=_JOIN_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f"cannot join the other processes of the run ({error}); check the"
      " addresses and that all were started"
    ) from error
  host = this_host()
  if host.count > 1:
    sys.stderr = _Labelled(sys.stderr, f"host {host.index}: ")
    threading.Thread(
      target=_follow_failures, args=(_store(),), daemon=True
    ).start()


def tell_others(problem: str) -> None:
  """Ends the other hosts of the run with this message, wherever they wait."""
  if not jax.distributed.is_initialized() or this_host().count == 1:
    return  # And touches no device.
  text = json.dumps([this_host().index, problem])
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # Another was first.
    _store().key_value_set(_FAILURE, text)


def leave_cluster(status: int) -> None:
  """Ends the process with `status` where other hosts still wait for it.

  A host that failed alone would wait, when Python ends, for all others to come
  to the same point, while they wait for it in a sum. `tell_others` brings them
  here, too.
  """
  if not jax.distributed.is_initialized() or this_host().count == 1:
    return
  _leaving.set()
  _shut_down_or_exit(status)


def _shut_down_or_exit(status: int) -> None:
  leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  leaving.start()
  leaving.join(_LEAVE_SECONDS)
  if leaving.is_alive():
    sys.stderr.flush()
    os._exit(status)


def _follow_failures(store: Any) -> None:
  """Ends the process once another host has failed; runs in a thread.

  Nothing else can: a sum over hosts, or a barrier, waits inside XLA.
  """
  while not _leaving.wait(_LOOK_SECONDS):
    try:
      host, problem = json.loads(store.key_value_try_get(_FAILURE))
    except jax.errors.JaxRuntimeError:  # There is nothing.
      continue
    if not _leaving.wait(_GRACE_SECONDS):
      sys.stderr.write(f"error: host {host}: {problem}\n")
      sys.stderr.flush()
      _shut_down_or_exit(2)
      os._exit(2)


def _store() -> Any:
  """What all hosts share; JAX has no public door to it, orbax takes this."""
  return distributed.global_state.client


def in_cluster() -> bool:
  """Whether the environment speaks of several processes."""
  env = os.environ
  if any(env.get(name) for name in _CLUSTER):
    return True
  tasks = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
  if any(int(env.get(name) or 1) > 1 for name in tasks):
    return "SLURM_PROCID" in env or "OMPI_COMM_WORLD_SIZE" in env
  # JAX asks Kubernetes by way of a package.
  in_job = "JOB_COMPLETION_INDEX" in env and "KUBERNETES_SERVICE_HOST" in env
  if in_job and importlib.util.find_spec("kubernetes"):
    return True
  # Other devices than a TPU's chips have such files too.
  if env.get("JAX_PLATFORMS") == "cpu" or not importlib.util.find_spec(
    "libtpu"
  ):
    return False
  chips = "accel[0-9]*", "vfio/[0-9]*"
  return any(any(pathlib.Path("/dev").glob(name)) for name in chips)


class _Labelled:
  """A text stream that starts every line with the name of the host."""

  def __init__(self, stream: TextIO, label: str):
    self._stream, self._label, self._starts = stream, label, True

  def write(self, text: str) -> int:
    lines = text.splitlines(keepends=True)
    for line in lines:
      self._stream.write(self._label + line if self._starts else line)
      self._starts = line.endswith("\n")
    return len(text)

  def isatty(self) -> bool:
    return False  # Lines of several hosts meet: nothing is drawn over.

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


@contextlib.contextmanager
def same_fate() -> Iterator[None]:
  """What a UserError ends on one host, it ends on all, with that message.

  All hosts leave the context together: it is a barrier.
  """
  problem: Exception | None = None
  try:
    yield
  except (UserError, OSError) as error:
    problem = error
  if this_host().count > 1:
    mine = "" if problem is None else str(problem) or repr(problem)
    texts = _gather_texts(mine)
    failed = [i for i, text in enumerate(texts) if text]
    if failed and problem is None:
      problem = UserError(f"host {failed[0]}: {texts[failed[0]]}")
  if problem is not None:
    raise problem


def check_same(facts: dict[str, str]) -> None:
  """Raises a UserError unless all hosts give the same value for each name.

  Args:
    facts: what a run must have in common, as text.
  """
  if this_host().count == 1:
    return
  theirs = [
    json.loads(text) for text in _gather_texts(json.dumps(_digest(facts)))
  ]
  for host, other in enumerate(theirs):
    differ = [name for name in facts if other[name] != theirs[0][name]]
    if differ:
      raise UserError(
        f"host {host} differs from host 0 in {', '.join(differ)}; start all"
        " hosts with the same command, code and data"
      )


def _digest(facts: dict[str, str]) -> dict[str, str]:
  return {
    name: hashlib.sha256(text.encode()).hexdigest()
    for name, text in facts.items()
  }


def from_primary(value: Any) -> Any:
  """Host 0's value, anything JSON can hold, on all hosts."""
  if this_host().count == 1:
    return value
  return json.loads(_gather_texts(json.dumps(value))[0])


def from_all(value: Any) -> list[Any]:
  """Every host's value, anything JSON can hold, by host, on all hosts."""
  if this_host().count == 1:
    return [value]
  return [json.loads(text) for text in _gather_texts(json.dumps(value))]


def _gather_texts(text: str) -> list[str]:
  """The texts of all hosts, on all hosts."""
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32([len(data)]))
  padded = np.zeros(int(sizes.max()) + 1, np.uint8)
  padded[: len(data)] = data
  rows = np.asarray(multihost_utils.process_allgather(padded))
  return [
    bytes(row[:size]).decode()
    for row, size in zip(rows, np.ravel(sizes), strict=True)
  ]
