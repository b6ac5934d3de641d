"""Times the input of the training loop: a JSON object a set.

  python benchmarks/input_pipeline.py [NAME ...] [--data DIR] [--steps N]

Each set with its ready config as it stands (network, batch, crops,
augmentation), through the functions of the program: `pipeline.train_batches`,
`parallel.prefetch` and the jitted train step. DIR, or the environment variable
UNET_JAX_DATA, holds the folders `dsb2018` and `isbi2012`; a set that is not
there is a row with the reason. Data that the program draws itself comes last.

One loop as in training, without evaluating and saving: take a batch, dispatch
the step, wait for the sums of the step before. The first step, which compiles,
is not counted; what the threads read meanwhile is there at the second, as in
any run. No example was decoded before, so the first epoch is in the numbers.

  ours_seconds    seconds of a step: the loop's time over its steps
  wait_share      of that time, what the loop spends in taking batches; the
                  device may still work on the step before, so no more than
                  this is lost
  augment_share   the step with its augmentation less the step without, over the
                  step with it: medians of steps in turn (A B A B) in this
                  process, each waited for, on one batch that stays the same
  examples_per_second        of the pipeline alone, without any step, once it
                  has gone through the set: decoded examples are kept
  cold_examples_per_second   likewise on the way there, every file decoded
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import tempfile
import time

import jax

from unet_jax import config as config_lib
from unet_jax import program, workdir
from unet_jax.data import normalize, pipeline
from unet_jax.runtime import parallel
from unet_jax.schema import AugmentConfig

ROOT = pathlib.Path(__file__).parents[1]
# name -> (config, whether it needs a folder of data)
SETS = {
  "dsb2018": ("folder.py", True),
  "isbi2012": ("isbi2012.py", True),
  "synthetic": ("synthetic.py", False),
}


def time_loop(step, state, batches, put, num_steps):
  """(seconds, seconds in taking batches) of the loop, after its first step."""
  rng = jax.random.key(0)
  taking, pending = 0.0, None
  with contextlib.closing(parallel.prefetch(batches, put)) as ready:
    for i in range(num_steps + 1):
      if i == 1:
        jax.block_until_ready(state)
        begin = time.perf_counter()
      start = time.perf_counter()
      _, arrays = next(ready)
      if i:
        taking += time.perf_counter() - start
      state, sums = step(state, arrays, rng)
      if pending is not None:
        jax.device_get(pending)
      pending = sums
    jax.block_until_ready(state)
  return time.perf_counter() - begin, taking


def time_in_turn(steps, states, batch, num_turns):
  """Median seconds of each step, in turn on one batch."""
  times, rng = [[] for _ in steps], jax.random.key(0)
  for turn in range(num_turns + 1):
    for i, step in enumerate(steps):
      start = time.perf_counter()
      states[i], _ = step(states[i], batch, rng)
      jax.block_until_ready(states[i])
      if turn:  # The first one compiles.
        times[i].append(time.perf_counter() - start)
  return [statistics.median(t) for t in times]


def time_pipeline(make_batches, batch_size, num_examples):
  """Examples a second: through the set once, and ten times after that."""
  per_epoch = -(-num_examples // batch_size)
  with contextlib.closing(make_batches()) as batches:
    rates = []
    for num_batches in (per_epoch, 10 * per_epoch):
      start = time.perf_counter()
      for _ in range(num_batches):
        next(batches)
      rates.append(num_batches * batch_size / (time.perf_counter() - start))
  return rates


def measure(name, root, num_steps):
  """The row of a set."""
  file, needs_data = SETS[name]
  config = config_lib.load_config(str(ROOT / "configs" / file))
  if needs_data:
    config.data.dir = str(root / name) if root else ""
    if not (root and (root / name).is_dir()):
      where = config.data.dir or "no --data and no UNET_JAX_DATA"
      return {"name": name, "skipped": f"no data: {where}"}
  cfg = config_lib.parse(config)
  plain = dataclasses.replace(
    cfg, augment=AugmentConfig(flip=False, turn=False)
  )
  mesh = parallel.make_mesh()
  put = program.make_put(cfg, mesh)
  steps = [program.compile_train_step(c, mesh) for c in (cfg, plain)]
  with tempfile.TemporaryDirectory() as folder:
    source = pipeline.make_source(cfg, "train", pathlib.Path(folder))
    normalization = normalize.fit_normalization(source, cfg.data.normalize)

    def make_batches():
      return pipeline.train_batches(
        source, normalization, cfg=cfg, first_step=0
      )

    state = workdir.init_state(cfg, mesh)
    total, taking = time_loop(steps[0], state, make_batches(), put, num_steps)
    with contextlib.closing(make_batches()) as batches:
      batch = put(next(batches))
    states = [workdir.init_state(cfg, mesh) for _ in steps]
    augmented, without = time_in_turn(steps, states, batch, num_steps)
    size = cfg.train.batch_size
    cold, warm = time_pipeline(make_batches, size, len(source))
  return {
    "name": name,
    "ours_seconds": round(total / num_steps, 4),
    "wait_share": round(taking / total, 4),
    "augment_share": round(1 - without / augmented, 4),
    "examples_per_second": round(warm),
    "cold_examples_per_second": round(cold),
    "step_examples_per_second": round(size * num_steps / total, 1),
    "batch": f"{size} x {' x '.join(map(str, cfg.data.crop_size))}",
    "device": mesh.devices.flat[0].device_kind,
    "cores": len(os.sched_getaffinity(0)),
  }


def main():
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", default=list(SETS), metavar="NAME")
  parser.add_argument("--data", default=os.environ.get("UNET_JAX_DATA"))
  parser.add_argument("--steps", type=int, default=20)
  flags = parser.parse_args()
  root = pathlib.Path(flags.data).resolve() if flags.data else None
  for name in flags.names:
    print(json.dumps(measure(name, root, flags.steps)), flush=True)


if __name__ == "__main__":
  main()
