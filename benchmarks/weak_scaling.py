"""Times a step of the seed's network on 1 and on 2 hosts: a JSON object.

  python benchmarks/weak_scaling.py [--steps N] [--size PIXELS]

Hosts are processes here, each with one core and one image, which speak through
the loopback device: what the exchange of gradients and of batch norm's sums
costs, without a network and without more memory bandwidth. `ratio` is the time
alone / the time together: 1 would be perfect.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time


def work(steps, size):
  """One host: the median seconds of its steps, printed by host 0."""
  import dataclasses

  import jax
  import numpy as np

  from unet_jax import config as config_lib
  from unet_jax import program, workdir
  from unet_jax.runtime import parallel

  parallel.start_cluster(heartbeat_seconds=100)
  host = parallel.this_host()
  config = config_lib.default_config()
  config.model.preset, config.optimizer.name = "seed", "sgd"
  config.data.crop_size = (size,)
  cfg = config_lib.parse(config)
  train = dataclasses.replace(cfg.train, batch_size=host.count)
  cfg = dataclasses.replace(cfg, train=train)
  mesh = parallel.make_mesh()
  step = program.compile_train_step(cfg, mesh)
  state = workdir.init_state(cfg, mesh)
  rng, image = program.make_rng(cfg, mesh), np.zeros((1, size, size, 1))
  batch = program.make_put(cfg, mesh)(
    {
      "id": np.full(1, host.index, np.int32),
      "image": image.astype(np.float32),
      "label": np.zeros((1, size, size), np.int32),
      "weight": np.ones((1, size, size), np.float32),
      "valid": np.ones(1, np.float32),
    }
  )
  times = []
  for _ in range(steps + 1):
    start = time.perf_counter()
    state, _ = step(state, batch, rng)
    jax.block_until_ready(state)
    times.append(time.perf_counter() - start)
  if host.index == 0:
    print(statistics.median(times[1:]), flush=True)


def measure(num_hosts, flags, cores):
  """Median seconds of a step on so many hosts, a core each."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  processes = []
  for host in range(num_hosts):
    cluster = {
      "JAX_COORDINATOR_ADDRESS": address,
      "JAX_NUM_PROCESSES": str(num_hosts),
      "JAX_PROCESS_ID": str(host),
    }
    size = ("--size", str(flags.size), "--steps", str(flags.steps))
    core = cores[host]
    process = subprocess.Popen(
      [sys.executable, __file__, "--worker", *size],
      env={**os.environ, "JAX_PLATFORMS": "cpu", **cluster},
      stdout=subprocess.PIPE,
      text=True,
      preexec_fn=lambda core=core: os.sched_setaffinity(0, {core}),
    )
    processes.append(process)
  outputs = [process.communicate()[0] for process in processes]
  if any(process.returncode for process in processes):
    sys.exit("a host failed")
  return float(outputs[0].split()[-1])


def main():
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=5)
  parser.add_argument("--size", type=int, default=256)
  parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.worker:
    work(flags.steps, flags.size)
    return
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < 2:
    sys.exit("two cores are needed, a core a host")
  # In turn, twice: the machine's speed changes.
  turns = [(measure(1, flags, cores), measure(2, flags, cores)) for _ in "ab"]
  one, two = (statistics.median(column) for column in zip(*turns, strict=True))
  row = {
    "name": "weak_scaling_seed",
    "image": flags.size,
    "one_host_seconds": round(one, 3),
    "two_hosts_seconds": round(two, 3),
    "ratio": round(one / two, 2),
    "cores_a_host": 1,
  }
  print(json.dumps(row))


if __name__ == "__main__":
  main()
