"""Processes that take turns: what the timing scripts against PyTorch share.

Ours and each way to run PyTorch live in a process of their own and do two calls
each in turn, the second of which is timed, so that a change of the machine's
speed meets all alike. Ours runs with malloc on huge pages, as the program
starts itself; PyTorch as it is installed and, beside that, with the same
setting. A row's `ratio` is the fastest median of PyTorch as installed / ours,
`ratio_huge_pages` the same of PyTorch with huge pages: above 1 we are faster.
"""

import argparse
import itertools
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
# What runtime.memory sets.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


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
    # As in training, where steps follow one another: what the process freed
    # before its pause, a virtual machine may have given back to its host.
    call()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(seconds, peak, flush=True)


class _Worker:
  """A process that waits for its turns."""

  def __init__(self, name, who, huge_pages):
    # The script that runs, started again.
    command = [sys.executable, sys.argv[0], "--worker", name, who]
    self.times, self.peak = [], 0
    self.process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, **(HUGE_PAGES if huge_pages else {})},
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
  keys = [("ours", True), *itertools.product(LAYOUTS, (False, True))]
  workers = {key: _Worker(name, *key) for key in keys}
  workers = {key: worker for key, worker in workers.items() if worker.works}
  for _ in range(num_turns):
    for worker in workers.values():
      worker.turn()
  for worker in workers.values():
    worker.close()
  seconds = {key: statistics.median(w.times) for key, w in workers.items()}
  ours = seconds.pop(("ours", True))

  def fastest(huge_pages):
    return min((k for k in seconds if k[1] == huge_pages), key=seconds.get)

  peer, equal = fastest(False), fastest(True)
  return {
    "name": name,
    "ours_seconds": round(ours, 3),
    "peer": f"PyTorch {peer[0]}",
    "peer_seconds": round(seconds[peer], 3),
    "ratio": round(seconds[peer] / ours, 2),
    "peer_huge_pages_seconds": round(seconds[equal], 3),
    "ratio_huge_pages": round(seconds[equal] / ours, 2),
    "all_peers_seconds": {
      who + "_huge_pages" * huge: round(v, 3)
      for (who, huge), v in seconds.items()
    },
    "ours_peak_mb": workers["ours", True].peak // 2**20,
    "peer_peak_mb": workers[peer].peak // 2**20,
    "cores": len(os.sched_getaffinity(0)),
  }
