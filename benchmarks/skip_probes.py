"""Times a training step with and without skip probes: a JSON object a row.

  python benchmarks/skip_probes.py [NAME ...] [--steps N]

Three steps are compiled in one process and take turns, so that a change of the
machine's speed meets all: without probes, with probes that nobody hears, and
heard ones. `silent_cost` and `heard_cost` are the medians over turns of that
step's time by the one without, less 1; `cost` is that of `train.log_every`
steps, of which one is heard. The aim is less than 0.02.
"""

import argparse
import json
import statistics
import time

CASES = {
  "study": {"data.crop_size": (64,)},
  "seed": {
    "model.preset": "seed",
    "data.crop_size": (256,),
    "train.batch_size": 2,
  },
  "nested": {"model.decoder": "nested", "data.crop_size": (64,)},
  "full_scale": {"model.decoder": "full_scale", "data.crop_size": (64,)},
}


def make_step(overrides, log_every):
  """One training step on zeros, as a function that waits for its end.

  Args:
    overrides: of the config.
    log_every: every so-manieth step is heard; 0 = a step without probes.
  """
  import jax
  import numpy as np

  from unet_jax import config as config_lib
  from unet_jax import program, workdir
  from unet_jax.runtime import parallel
  from unet_jax.studies import bases

  config = bases.get_base("synthetic")
  config.train.probe_skips = log_every > 0
  config.train.log_every = log_every
  for key, value in overrides.items():
    config_lib.assign(config, key, value)
  cfg = config_lib.parse(config)
  mesh = parallel.make_mesh(1)
  step = program.make_executor(cfg, mesh, program.compile_train_step(cfg, mesh))
  state, rng = workdir.init_state(cfg, mesh), program.make_rng(cfg, mesh)
  _, shapes, _ = program.abstract_inputs(cfg, mesh)
  batch = {
    k: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
    for k, x in shapes.items()
  }

  def run():
    nonlocal state
    state, sums = step(state, batch, rng)
    jax.block_until_ready((state, sums))

  return run


def seconds(run):
  """Of the second of two calls."""
  run()
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def main():
  """Prints the rows."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", default=list(CASES), metavar="NAME")
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--log-every", type=int, default=20)
  flags = parser.parse_args()
  for name in flags.names:
    steps = [make_step(CASES[name], every) for every in (0, 10**6, 1)]
    for step in steps:
      seconds(step)
    turns = [[seconds(step) for step in steps] for _ in range(flags.steps)]
    silent = statistics.median(b / a for a, b, _ in turns) - 1
    heard = statistics.median(c / a for a, _, c in turns) - 1
    row = {
      "name": f"skip_probes_{name}",
      "off_seconds": statistics.median(turn[0] for turn in turns),
      "silent_cost": silent,
      "heard_cost": heard,
      "cost": silent + (heard - silent) / flags.log_every,
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
