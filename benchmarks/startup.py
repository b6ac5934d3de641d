"""Times the demo from the command to its first step: a JSON object a row.

  python benchmarks/startup.py

The first start compiles, with an empty folder for compiled programs; the second
finds them there. `--help` imports no JAX.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
RUN = [sys.executable, "-m", "unet_jax.main"]
DEMO = [*RUN, "--config", "configs/synthetic.py", "--config.train.log_every=1"]


def until_first_step(workdir, cache):
  """Seconds to the first line of a step; the run is ended there."""
  env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  flag = f"--config.runtime.compilation_cache={cache}"
  start = time.perf_counter()
  with subprocess.Popen(
    [*DEMO, flag, "--workdir", str(workdir)],
    cwd=ROOT,
    env=env,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    for line in process.stderr:
      if line.startswith("step "):
        seconds = time.perf_counter() - start
        break
    process.kill()
  return seconds


def main():
  """Three rows."""
  start = time.perf_counter()
  subprocess.run([*RUN, "--help"], cwd=ROOT, check=True, capture_output=True)
  rows = [("help", time.perf_counter() - start)]
  with tempfile.TemporaryDirectory() as folder:
    for name in ("first_start", "second_start"):
      workdir = pathlib.Path(folder) / name
      rows.append((name, until_first_step(workdir, f"{folder}/cache")))
  for name, seconds in rows:
    print(json.dumps({"name": name, "ours_seconds": round(seconds, 2)}))


if __name__ == "__main__":
  main()
