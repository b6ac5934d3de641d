"""Times a training step with and without skip probes: a JSON object a row.

  python benchmarks/skip_probes.py [NAME ...] [--steps N]

Both steps are compiled in one process and take turns, so that a change of the
machine's speed meets both. `cost` is the median over turns of on / off, less 1;
the aim is less than 0.02, which a nested decoder with its many sides misses.
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


def make_step(overrides, probe):
  """One training step on zeros, as a function that waits for its end."""
  import jax
  import numpy as np

  from unet_jax import config as config_lib
  from unet_jax import program, workdir
  from unet_jax.runtime import parallel
  from unet_jax.studies import bases

  config = bases.get_base("synthetic")
  for key, value in {**overrides, "train.probe_skips": probe}.items():
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
  flags = parser.parse_args()
  for name in flags.names:
    off, on = (make_step(CASES[name], probe) for probe in (False, True))
    seconds(off), seconds(on)
    turns = [(seconds(off), seconds(on)) for _ in range(flags.steps)]
    row = {
      "name": f"skip_probes_{name}",
      "off_seconds": statistics.median(a for a, _ in turns),
      "on_seconds": statistics.median(b for _, b in turns),
      "cost": statistics.median(b / a for a, b in turns) - 1,
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
