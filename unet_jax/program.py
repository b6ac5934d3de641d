"""The train step of a run as one program for a mesh of devices.

Both strategies run the same pure function. What they are given and what they
give are global arrays, so neither is seen in a checkpoint.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unet_jax import geometry, optimizer
from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.data import augment
from unet_jax.errors import UserError
from unet_jax.objectives import losses
from unet_jax.runtime import parallel
from unet_jax.state import TrainState
from unet_jax.train_step import Batch, StepSums, TrainStep, make_train_step

Put = Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]


def make_put(
  cfg: Config, mesh: Mesh, asked: Callable[[], int] = lambda: 0
) -> Put:
  """Puts this host's part of a batch on its devices, as the step takes it.

  Args:
    cfg: its strategy.
    mesh: the devices.
    asked: the signal by which this host is asked to stop, or 0. It goes with
      the batch: so the step itself tells all hosts.
  """
  stacked = cfg.parallel.strategy == "pmap"
  put = parallel.put_stacked if stacked else parallel.put_batch

  def put_with_stop(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    stop = np.full(len(batch["id"]), asked(), np.int32)
    return put({**batch, "stop": stop}, mesh)

  return put_with_stop


def compile_train_step(cfg: Config, mesh: Mesh) -> jax.stages.Compiled:
  """Compiles the step for the devices of `mesh`, which need not be here."""
  step = _JITTED[cfg.parallel.strategy](cfg, mesh)
  inputs = abstract_inputs(cfg, mesh)
  if cfg.parallel.strategy == "pmap" and parallel.this_host().count > 1:
    inputs = _zeros(inputs)  # Of several hosts pmap takes arrays alone.
  return step.lower(*inputs).compile()


def _zeros(inputs: Any) -> Any:
  def make() -> Any:
    state, batch = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), inputs[:2]
    )
    return state, batch, jax.random.key(0)

  return jax.jit(
    make, out_shardings=jax.tree.map(lambda x: x.sharding, inputs)
  )()


def make_executor(
  cfg: Config, mesh: Mesh, compiled: jax.stages.Compiled
) -> TrainStep:
  """The compiled step, from global state to global state."""
  if cfg.parallel.strategy == "jit":
    return compiled

  def run(
    state: TrainState, batch: Any, rng: jax.Array
  ) -> tuple[TrainState, StepSums]:
    return parallel.as_global(compiled(state, batch, rng), mesh)

  return run


def make_rng(cfg: Config, mesh: Mesh) -> jax.Array:
  """The key that every step folds its number into."""
  make = jax.jit(jax.random.key, out_shardings=parallel.replicated(mesh))
  return make(cfg.seed)


def check_memory(cfg: Config, mesh: Mesh, compiled: jax.stages.Compiled) -> str:
  """A line: what a step needs on a device at its peak, and what is there.

  Raises:
    UserError: it does not fit; names the three cheapest remedies.
  """
  need, have = peak_bytes(compiled), parallel.memory_bytes(mesh)
  text = f"a step needs {_size(need)} of memory a device"
  if have is None:
    return text
  text += f", {_size(have)} are there"
  if need <= have:
    return text
  here = mesh.local_devices
  remedies = "; or ".join(_remedies(cfg, here[0].platform, len(here))[:3])
  raise UserError(f"config.train.batch_size: {text}; {remedies}")


def peak_bytes(compiled: jax.stages.Compiled) -> int:
  """What a step holds on a device: what goes in, comes out, and lies between.

  As XLA plans it. The new state takes the place of the old one, once.
  """
  memory = compiled.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )


def _remedies(cfg: Config, platform: str, num_devices: int) -> list[str]:
  """What takes less memory, the cheapest in time and numbers first."""
  train, model = cfg.train, cfg.model
  more = [
    n
    for n in range(train.accumulate + 1, train.batch_size + 1)
    if train.batch_size % n == 0
  ]
  found = [
    f"config.train.accumulate={n} (the same gradient, but for batch norm)"
    for n in more[:1]
  ]
  # XLA on CPU finds both computations equal, and keeps the first.
  if model.remat != "level" and platform != "cpu":
    found.append(
      "config.model.remat=level (same numbers, one more forward pass)"
    )
  if model.dtype == "float32":
    found.append("config.model.dtype=bfloat16 (half the activations)")
  space = 2 * cfg.parallel.space
  cuts = cfg.data.crop_size[0] % (space * 2 ** model.depths[0]) == 0
  if (
    cuts
    and num_devices % space == 0
    and model.padding == "same"
    and cfg.parallel.strategy == "jit"
  ):
    found.append(f"config.parallel.space={space} (an image over more devices)")
  halves = [
    geometry.nearest_legal(n // 2, depth, model.size_rule)
    for n, depth in zip(cfg.data.crop_size, model.depths, strict=True)
  ]
  half = ",".join(str(below or above) for below, above in halves)
  found.append(f"config.data.crop_size={half}")
  return found


def _size(num_bytes: int) -> str:
  return f"{num_bytes / 2**20:,.0f} MiB"


def abstract_inputs(cfg: Config, mesh: Mesh) -> tuple[TrainState, Any, Any]:
  """Shapes, dtypes and shardings of (state, batch, rng); nothing is computed.

  The state is donated: a step writes over it.
  """
  size = cfg.data.crop_size
  examples = (cfg.train.batch_size,)
  is_ids = cfg.data.source == "tokens"
  shapes = {
    "id": (examples, jnp.int32),
    "image": (
      (*examples, *cfg.input_size),
      jnp.int32 if is_ids else jnp.float32,
    ),
    "label": ((*examples, *size), jnp.int32),
    "weight": ((*examples, *size), jnp.float32),
    "valid": (examples, jnp.float32),
    "stop": (examples, jnp.int32),
  }
  if cfg.data.source == "volumes":
    shapes["spacing"] = ((*examples, cfg.model.dims), jnp.float32)

  def batch_of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    if cfg.parallel.strategy == "pmap":
      n = mesh.devices.size
      shape = (n, shape[0] // n, *shape[1:])
    sharding = parallel.over_data(mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  whole = parallel.replicated(mesh)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return (
    workdir_lib.abstract_state(cfg, mesh),
    {name: batch_of(*shape) for name, shape in shapes.items()},
    jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
  )


def sharded_fields(mesh: Mesh) -> dict[str, Any]:
  """Fields of a model whose images are cut over several devices.

  Of XLA's own convolution the partitioner knows which borders to exchange; of
  our forms it would gather the image.
  """
  return {"conv": "xla"} if mesh.shape["space"] > 1 else {}


def _make_step(cfg: Config, mesh: Mesh, **model: Any) -> TrainStep:
  augment_fn = augment.make_augment(cfg.augment)

  def prepare(batch: Batch, rng: jax.Array) -> Batch:
    return parallel.cut_images(augment_fn(batch, rng), mesh)

  tx = optimizer.make_optimizer(cfg.optimizer)
  return make_train_step(
    model=workdir_lib.make_model(cfg, **model),
    loss_fn=losses.make_loss(**dataclasses.asdict(cfg.loss)),
    tx=tx,
    schedule=optimizer.make_schedule(cfg.optimizer, cfg.train.num_steps),
    augment_fn=prepare,
    ema_decay=cfg.optimizer.ema_decay,
    accumulate=cfg.train.accumulate,
    probe_every=cfg.train.log_every if cfg.train.probe_skips else 0,
    axis_name=model.get("axis_name"),
  )


def _jit(cfg: Config, mesh: Mesh) -> Any:
  return jax.jit(
    _make_step(cfg, mesh, shards=mesh.shape["data"], **sharded_fields(mesh)),
    out_shardings=parallel.replicated(mesh),
    donate_argnums=0,
  )


def _pmap(cfg: Config, mesh: Mesh) -> Any:
  return jax.pmap(
    _make_step(cfg, mesh, axis_name="data"),
    axis_name="data",
    in_axes=(None, 0, None),
    out_axes=(None, None),
    devices=list(mesh.devices.flat),
    donate_argnums=0,
  )


# The choices of config.parallel.strategy.
_JITTED = {"jit": _jit, "pmap": _pmap}
