"""Starts what is missing of the runs behind docs/RESULTS.md.

  python benchmarks/results.py RUNS --data DIR [--clock cpu] [SET ...]

DIR holds the folders of the real sets. First our runs of every SET (all of
them without one), three seeds each, in RUNS/SET; then, for those of images, the
seed's network in PyTorch, see results_peer.py. Started again it goes on. More
arguments (--config.SECTION.FIELD=VALUE) go to our runs. Then docs/results.py
makes the page.
"""

import argparse
import pathlib
import runpy
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = "configs/results.py"
SETS = tuple(runpy.run_path(str(ROOT / CONFIG))["SETS"])
WITHOUT_PEER = ("ewt_upos",)


def our_command(name, data, runs):
  """What trains and scores a set."""
  folder = f"{data}/{name}"
  more = [] if name == "synthetic" else [f"--config.data.dir={folder}"]
  command = ["-m", "unet_jax.main", "--mode", "ablate"]
  config = ["--config", f"{CONFIG}:{name}", *more]
  return [*command, *config, "--workdir", f"{runs}/{name}"]


def peer_command(name, runs, clock):
  """What trains its peer."""
  return ["benchmarks/results_peer.py", f"{runs}/{name}", "--clock", clock]


def start(command):
  """Runs Python in the root; ends with it where it does not end well."""
  print("python", *command, flush=True)
  with subprocess.Popen([sys.executable, *command], cwd=ROOT) as process:
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    status = process.wait()
  if status:
    sys.exit(status if status > 0 else 128 - status)


def main():
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("runs", type=pathlib.Path, metavar="RUNS")
  parser.add_argument("sets", nargs="*", metavar="SET", help=", ".join(SETS))
  parser.add_argument("--data", type=pathlib.Path, default="data")
  parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
  flags, overrides = parser.parse_known_intermixed_args()
  sets = flags.sets or SETS
  if unknown := set(sets) - set(SETS):
    parser.error(f"no set {', '.join(unknown)}; choose from {', '.join(SETS)}")
  runs, data = flags.runs.resolve(), flags.data.resolve()
  for name in sets:
    start([*our_command(name, data, runs), *overrides])
  for name in sets:
    if name not in WITHOUT_PEER:
      start(peer_command(name, runs, flags.clock))


if __name__ == "__main__":
  main()
