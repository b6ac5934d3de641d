"""Processes that take turns: what the timing scripts against PyTorch share.

Ours and each way to run PyTorch live in a process of their own and do one call
each in turn, so that a change of the machine's speed meets all alike. A row's
`ratio` is the fastest PyTorch median / ours: above 1 we are faster.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

# Ways to run PyTorch, see peers.py.
LAYOUTS = ("eager", "channels_last", "compile")


def main(
  make: Callable[[str, str], Callable[[], None]],
  names: Iterable[str],
  *,
  doc: str,
) -> None:
  """The command line of a script: a row for each name.

  Args:
    make: (name, who) -> a function that does one call and waits for its end;
      `who` is "ours" or one of LAYOUTS. Runs in the worker's process.
    names: what can be timed.
    doc: the script's docstring.
  """
  parser = argparse.ArgumentParser(description=doc.splitlines()[0])
  parser.add_argument("names", nargs="*", default=list(names), metavar="NAME")
  parser.add_argument("--steps", type=int, default=5)
  parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.worker:
    _work(make(*flags.worker))
    return
  for name in flags.names:
    print(json.dumps(_compare(name, flags.steps)), flush=True)


def _work(call):
  """A worker: a call for each line it reads, answered with its seconds."""
  call()  # Compiles.
  print("ready", flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(seconds, peak, flush=True)


class _Worker:
  """A process that waits for its turns."""

  def __init__(self, name, who):
    # The script that runs, started again.
    command = [sys.executable, sys.argv[0], "--worker", name, who]
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


def _compare(name, num_turns):
  """A row of the table."""
  workers = {who: _Worker(name, who) for who in ("ours", *LAYOUTS)}
  workers = {who: worker for who, worker in workers.items() if worker.works}
  for _ in range(num_turns):
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
