"""Devices and hosts: the only door to meshes and process indices.

Arrays at rest are global: replicated state, batches sharded over the mesh axis
"data". So a checkpoint does not know how many devices wrote it.
"""

import contextlib
import dataclasses
from collections.abc import Generator
from concurrent import futures

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Host:
  """This process among all: `index` in 0..`count` - 1; 0 writes the files."""

  index: int
  count: int

  @property
  def is_primary(self) -> bool:
    return self.index == 0


def this_host() -> Host:
  """The index of this process and the number of processes."""
  return Host(jax.process_index(), jax.process_count())


def make_mesh() -> Mesh:
  """All devices of all hosts: axes ("data", "space"), space of size 1.

  Built by hand because `jax.make_mesh` gives explicit axis types.
  """
  devices = np.array(jax.devices()).reshape(-1, 1)
  return Mesh(devices, ("data", "space"))


def check_batch_size(batch_size: int, mesh: Mesh, key: str) -> None:
  """Raises a UserError unless every device gets the same number of examples."""
  n = mesh.shape["data"]
  if batch_size % n:
    nearest = max(n, round(batch_size / n) * n)
    raise UserError(
      f"config.{key}={batch_size} does not divide over {n} devices; nearest:"
      f" {nearest}"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of state: a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its first axis split over "data"."""
  return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This host's part of a batch [b, ...] -> global arrays [B, ...]."""
  sharding = over_data(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, array)
    for name, array in batch.items()
  }


def prefetch(
  batches: Generator[dict[str, np.ndarray], None, None], mesh: Mesh
) -> Generator[tuple[dict[str, np.ndarray], dict[str, jax.Array]], None, None]:
  """Each batch, as it came and on the devices; a thread fetches the next one.

  What fails there is raised where it is asked for. Closing closes `batches`.
  """

  def load() -> tuple[dict[str, np.ndarray], dict[str, jax.Array]] | None:
    batch = next(batches, None)
    return None if batch is None else (batch, put_batch(batch, mesh))

  # The thread ends before `batches`, which it may be inside, is closed.
  with contextlib.closing(batches), futures.ThreadPoolExecutor(1) as pool:
    ahead = pool.submit(load)
    while (loaded := ahead.result()) is not None:
      ahead = pool.submit(load)
      yield loaded
