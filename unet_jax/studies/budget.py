"""What the arms of a study cost, and how many steps each gets for it."""

import dataclasses
import functools
import pathlib
import time

import clu.parameter_overview
import jax
import numpy as np

from unet_jax import program
from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.inspect import cost
from unet_jax.models.skips import Context
from unet_jax.runtime import parallel, writers


def count(cfg: Config) -> tuple[int, int]:
  """(parameters, multiply-accumulates of a forward pass of one crop)."""
  model = workdir_lib.make_model(cfg)
  shape = (1, *cfg.input_size)
  image = jax.ShapeDtypeStruct(shape, np.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  params = clu.parameter_overview.count_parameters(variables["params"])
  # Some controls look at who is in the batch.
  one = np.zeros(1, np.int32)
  apply = functools.partial(model.apply, context=Context(one, one))
  # clu counts a parameter without axes as 1.0.
  return int(params), cost.count_macs(apply, variables, image)


def fit(cfg: Config, share: float) -> Config:
  """`cfg` with `share` times its steps, one at least."""
  steps = max(1, round(cfg.train.num_steps * share))
  train_cfg = dataclasses.replace(cfg.train, num_steps=steps)
  return dataclasses.replace(cfg, train=train_cfg)


def measure(
  configs: dict[str, Config], workdir: pathlib.Path, num_steps: int
) -> dict[str, float]:
  """Seconds of a step of each arm, measured once a study.

  They depend on the machine and on what else it does. So they are kept in
  budget.json, and a study that goes on, or whose other shards start, uses what
  is there; only arms that are new are measured.

  Args:
    configs: of each arm.
    workdir: of the study.
    num_steps: timed, after one that compiles.
  """
  path = workdir / "budget.json"
  workdir.mkdir(parents=True, exist_ok=True)
  with workdir_lib.locked(workdir, ".budget.lock"):
    found = workdir_lib.read_json(path, "delete it") if path.exists() else {}
    for name, cfg in configs.items():
      if name not in found:
        found[name] = step_seconds(cfg, num_steps)
        writers.log(f"{name}: {found[name]:.4f} s a step")
        workdir_lib.write_json(path, found)
  return {name: found[name] for name in configs}


def step_seconds(cfg: Config, num_steps: int) -> float:
  """The mean of so many steps on zeros, after one that compiles."""
  mesh = parallel.make_mesh(cfg.parallel.space)
  step = program.make_executor(cfg, mesh, program.compile_train_step(cfg, mesh))
  state, rng = workdir_lib.init_state(cfg, mesh), program.make_rng(cfg, mesh)
  _, shapes, _ = program.abstract_inputs(cfg, mesh)
  batch = {
    k: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
    for k, x in shapes.items()
  }
  for turn in range(num_steps + 1):
    if turn == 1:
      jax.block_until_ready(state)
      start = time.perf_counter()
    state, _ = step(state, batch, rng)
  jax.block_until_ready(state)
  return (time.perf_counter() - start) / num_steps
