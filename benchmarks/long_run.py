"""Does a long run stay as it is? Memory and open files over thousands of steps.

python benchmarks/long_run.py [--steps 5000]

A tiny network with an evaluation, a save and pictures every 25 steps: 200 of
each in 5,000 steps. Prints one JSON object: the resident memory and the open
files after a fifth of the steps and at the end. Linux only (/proc).
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent


def command(workdir, steps):
  """The command line of the run."""
  values = {
    "model.widths": "2,4",
    "data.synthetic_size": 16,
    "data.crop_size": 16,
    "data.synthetic_train": 20,
    "data.synthetic_val": 5,
    "train.num_steps": steps,
    "train.log_every": 5,
    "train.eval_every": 25,
    "train.checkpoint_every": 25,
    "train.num_pictures": 1,
  }
  flags = [f"--config.{key}={value}" for key, value in values.items()]
  main = [sys.executable, "-m", "unet_jax.main"]
  config = ["--config", ROOT / "configs" / "synthetic.py"]
  return [*map(str, [*main, *config, "--workdir", workdir, *flags])]


def measure(pid):
  """(resident bytes, open files, threads) of a process."""
  process = pathlib.Path("/proc") / str(pid)
  fields = dict(
    line.split(":", 1) for line in (process / "status").read_text().splitlines()
  )
  files = len(list((process / "fd").iterdir()))
  resident = int(fields["VmRSS"].split()[0]) * 1024
  return resident, files, int(fields["Threads"])


def run(steps):
  """{"resident_bytes": [early, late], "files": ..., "threads": ...}."""
  with tempfile.TemporaryDirectory() as folder:
    argv = command(folder, steps)
    with subprocess.Popen(
      argv, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
      samples = []
      for line in process.stderr:
        if " on val: " in line:
          step = int(line.split()[1])
          samples.append((step, *measure(process.pid)))
    if process.returncode:
      raise SystemExit(f"the run ended with status {process.returncode}")
  # Means over a fifth of the run each: garbage comes and goes.
  early = [s for s in samples if steps / 5 <= s[0] < 2 * steps / 5]
  late = [s for s in samples if s[0] >= 4 * steps / 5]

  def both(column):
    return [
      round(sum(s[column] for s in part) / len(part)) for part in (early, late)
    ]

  return {
    "name": "long_run",
    "steps": steps,
    "evaluations": len(samples),
    "resident_bytes": both(1),
    "files": both(2),
    "threads": both(3),
  }


def main():
  """One row."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--steps", type=int, default=5000)
  print(json.dumps(run(parser.parse_args().steps)))


if __name__ == "__main__":
  main()
