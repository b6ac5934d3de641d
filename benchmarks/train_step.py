"""Times a training step against PyTorch's, side by side: a JSON object a row.

  python benchmarks/train_step.py [NAME ...] [--steps N]

Ours and each way to run PyTorch live in a process of their own and take turns,
one step each, so that a change of the machine's speed meets all alike. `ratio`
is the fastest PyTorch median / ours: above 1 we are faster. The first row is
the training step of the seed's network.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

# name -> input [B, *S], our model fields, the peer's fields
CASES = {
  "seed": (
    (2, 256, 256),
    {"preset": "seed"},
    {"widths": (64, 128, 256, 512), "up": "aligned"},
  ),
  "unet2015": (
    (1, 572, 572),
    {"preset": "unet2015"},
    {
      "widths": (64, 128, 256, 512, 1024),
      "up": "transpose",
      "norm": False,
      "valid": True,
    },
  ),
  "volume": (
    (1, 64, 64, 64),
    {"dims": 3, "widths": (16, 32, 64, 128)},
    {"widths": (16, 32, 64, 128), "up": "transpose"},
  ),
}


def make_our_step(fields, shape):
  """The train step as the program runs it: SGD, binary cross-entropy."""
  import jax
  import numpy as np

  from unet_jax import state as state_lib
  from unet_jax.models import build_model
  from unet_jax.objectives import losses
  from unet_jax.optimizer import make_optimizer, make_schedule
  from unet_jax.schema import OptimizerConfig
  from unet_jax.train_step import make_train_step

  model = build_model(num_classes=1, **fields)
  cfg = OptimizerConfig(
    name="sgd", learning_rate=0.01, schedule="constant", weight_decay=0.0
  )
  tx = make_optimizer(cfg)
  train_step = make_train_step(
    model=model,
    loss_fn=losses.make_loss(
      terms=("binary_cross_entropy",), weights=(), class_weights=()
    ),
    tx=tx,
    schedule=make_schedule(cfg, 1000),
  )
  train_step = jax.jit(train_step, donate_argnums=0)
  rng = np.random.default_rng(0)
  batch = jax.device_put(
    {
      "id": np.arange(shape[0], dtype=np.int32),
      "image": rng.normal(size=(*shape, 1)).astype(np.float32),
      "label": rng.integers(0, 2, shape).astype(np.int32),
      "weight": np.ones(shape, np.float32),
      "valid": np.ones(shape[0], np.float32),
    }
  )
  init = jax.jit(
    lambda key: state_lib.init_state(model, tx, key, (1, *shape[1:], 1))
  )
  state, key = init(jax.random.key(0)), jax.random.key(1)

  def step():
    nonlocal state
    state, _ = train_step(state, batch, key)
    jax.block_until_ready(state)

  return step


def work(name, who):
  """A worker: does a step for each line it reads, and answers with seconds."""
  shape, ours, theirs = CASES[name]
  if who == "ours":
    step = make_our_step(ours, shape)
  else:
    import peers

    step = peers.make_step(theirs, shape, who)
  step()  # Compiles.
  print("ready", flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(seconds, peak, flush=True)


class Worker:
  """A process that waits for its turns."""

  def __init__(self, name, who):
    command = [sys.executable, __file__, "--worker", name, who]
    self.times, self.peak = [], 0
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    self.works = self.process.stdout.readline() == "ready\n"

  def turn(self):
    self.process.stdin.write("\n")
    self.process.stdin.flush()
    seconds, peak = self.process.stdout.readline().split()
    self.times.append(float(seconds))
    self.peak = int(peak)

  def close(self):
    self.process.communicate()


def compare(name, num_steps):
  """A row of the table."""
  import peers

  workers = {who: Worker(name, who) for who in ("ours", *peers.LAYOUTS)}
  workers = {who: worker for who, worker in workers.items() if worker.works}
  for _ in range(num_steps):
    for worker in workers.values():
      worker.turn()
  for worker in workers.values():
    worker.close()
  medians = {who: statistics.median(w.times) for who, w in workers.items()}
  ours = medians.pop("ours")
  fastest = min(medians, key=medians.get)
  return {
    "name": name,
    "ours_seconds": round(ours, 3),
    "peer": f"PyTorch {fastest}",
    "peer_seconds": round(medians[fastest], 3),
    "ratio": round(medians[fastest] / ours, 2),
    "all_peers_seconds": {k: round(v, 3) for k, v in medians.items()},
    "ours_peak_mb": workers["ours"].peak // 2**20,
    "peer_peak_mb": workers[fastest].peak // 2**20,
    "cores": len(os.sched_getaffinity(0)),
  }


def main():
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", default=list(CASES), metavar="NAME")
  parser.add_argument("--steps", type=int, default=5)
  parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.worker:
    return work(*flags.worker)
  for name in flags.names:
    print(json.dumps(compare(name, flags.steps)), flush=True)
  return None


if __name__ == "__main__":
  main()
