"""Breaks a run at random moments, again and again, and compares its end.

python -m tests.soak --kills 50 --what run      (or study, or hosts)

SIGKILL, SIGTERM and a full disk in turn, at moments drawn from --seed. The
broken run must end as the unbroken one: metrics, parameters, optimizer state
and statistics equal to the bit, but for what the clock decides. A full disk
needs the right to mount a tmpfs; without it SIGKILL takes its turns.
"""

import argparse
import contextlib
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from tests import runs

STUDY = str(pathlib.Path(__file__).parent / "tiny_study.py")
FAULTS = ("kill", "term", "full")
# Longest wait between the first sign of work and a fault, in seconds.
_LONGEST = 2.0


def command(what, workdir, steps):
  """The arguments of the run that is broken."""
  if what == "study":
    return [
      *("--mode", "ablate", "--config", STUDY, "--workdir", workdir),
      *(f"--config.train.num_steps={steps}", "--config.study.seeds=0,1"),
    ]
  flags = [f"--config.train.num_steps={steps}"]
  flags += ["--config.train.eval_every=48", "--config.train.checkpoint_every=7"]
  flags += ["--config.train.log_every=20"]
  if what == "hosts":
    flags.append("--config.runtime.heartbeat_seconds=10")
  return runs.arguments(workdir, *flags)


def start(what, argv, output):
  """The processes of one start; what they print goes to the file `output`.

  A pipe that nobody reads meanwhile would stop a run that prints much.
  """
  if what == "hosts":
    return runs.start_hosts(2, *argv, stdout=output)
  root = str(pathlib.Path(__file__).parents[1])
  return [runs.start(*argv, env={"PYTHONPATH": root}, stdout=output)]


def finish(what, argv, folder, meanwhile=lambda processes: None):
  """Starts, does something meanwhile, and waits for the end.

  Returns:
    What `meanwhile` gave, the exit statuses, and all that was printed.
  """
  path = folder / "output.txt"
  with open(path, "w") as output:
    processes = start(what, argv, output)
    try:
      result = meanwhile(processes)
      statuses = [process.wait(timeout=900) for process in processes]
    finally:
      for process in processes:
        process.kill()
  return result, statuses, path.read_text()


def metrics_of(workdir):
  """The metrics files of a run, or of the runs of a study."""
  return [*workdir.glob("metrics.jsonl"), *workdir.glob("runs/*/metrics.jsonl")]


def size_of(workdir):
  """Bytes of metrics so far: they grow while steps are made."""
  return sum(p.stat().st_size for p in metrics_of(workdir))


def break_once(processes, workdir, fault, rng):
  """Waits for a random moment, then injects; whether the run was alive."""
  before = size_of(workdir)
  if rng.random() < 0.8:  # Else somewhere in the start-up.
    while size_of(workdir) == before:
      if any(p.poll() is not None for p in processes):
        break
      time.sleep(0.002)
  wait = rng.random() * _LONGEST
  end = time.monotonic() + wait
  while time.monotonic() < end:
    if any(p.poll() is not None for p in processes):
      return False
    time.sleep(0.002)
  victim = rng.choice(processes)
  filler = workdir.parent / "filler"
  if fault == "full":
    fill(filler)
    while all(p.poll() is None for p in processes):
      time.sleep(0.01)
  else:
    victim.send_signal(signal.SIGKILL if fault == "kill" else signal.SIGTERM)
  return True


def fill(path):
  """Takes all that is left of the disk; the run may write meanwhile."""
  with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
    while file.write(b"\0" * 4096):
      pass


def mount(folder):
  """Whether `folder` is now a disk of its own, that can be filled."""
  line = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
  return not subprocess.run(line, capture_output=True).returncode


def assert_same(what, a, b, steps):
  """The two ends are equal to the bit."""
  if what != "study":
    runs.assert_same_run(a, b, steps)
    return
  ours, theirs = (
    [json.loads(x) for x in (d / "results.jsonl").read_text().splitlines()]
    for d in (a, b)
  )
  for x, y in zip(ours, theirs, strict=True):
    for key in (k for k in x if "second" not in k and k != "git"):
      assert x[key] == y[key], (x["id"], key, x[key], y[key])
    folder = pathlib.Path("runs") / x["id"]
    runs.assert_same_run(a / folder, b / folder, steps)


def soak(what, kills, seed, folder, *, steps, log=print):
  """Breaks a run `kills` times; returns how often each fault was injected.

  Args:
    what: "run", "study" or "hosts" (two processes).
    kills: faults to inject; those that come after the end of the run do not
      count, and the run starts anew.
    seed: of the moments.
    folder: where the runs go; the broken one on a small disk of its own.
    steps: length of the run.
    log: takes a line a fault.

  Raises:
    AssertionError: the broken run did not end as the unbroken one.
  """
  rng = random.Random(seed)
  unbroken, disk = folder / "unbroken", folder / "disk"
  disk.mkdir(parents=True)
  argv = command(what, unbroken, steps)
  _, statuses, output = finish(what, argv, folder)
  assert not any(statuses), output
  mounted = mount(disk)
  workdir = disk / "broken"
  workdir.mkdir()
  argv = command(what, workdir, steps)
  counts = dict.fromkeys(FAULTS, 0)
  rounds = 0
  try:
    while (injected := sum(counts.values())) < kills:
      fault = FAULTS[injected % 3]
      fault = "kill" if fault == "full" and not mounted else fault
      hit, statuses, output = finish(
        *(what, argv, folder),
        lambda processes, fault=fault: break_once(
          processes, workdir, fault, rng
        ),
      )
      (disk / "filler").unlink(missing_ok=True)
      if hit and any(statuses):
        counts[fault] += 1
        log(f"{injected + 1:3d} {fault} {statuses} {_where(workdir)}")
        _check_status(fault, statuses, output)
      elif not any(statuses):  # It was at its end: compare, start anew.
        assert_same(what, unbroken, workdir, steps)
        rounds += 1
        shutil.rmtree(workdir)
        workdir.mkdir()
    _, statuses, output = finish(what, argv, folder)
    assert not any(statuses), output
    assert_same(what, unbroken, workdir, steps)
  finally:
    if mounted:
      subprocess.run(["umount", "-l", str(disk)], check=True)
  log(f"{counts}, {rounds + 1} runs broken, all equal to the unbroken one")
  return counts


def _check_status(fault, statuses, output):
  """What a fault of the user's side may end with; a traceback is a bug."""
  allowed = {
    "kill": {-signal.SIGKILL},
    # Before the handler stands, SIGTERM ends the process itself.
    "term": {143, -signal.SIGTERM},
    "full": {2},
  }[fault]
  assert any(status in allowed for status in statuses), (statuses, output)
  if fault == "full" or len(statuses) == 1:
    assert all(status in allowed for status in statuses), (statuses, output)
    assert "Traceback" not in output, output


def _where(workdir):
  lines = [p.read_text().count("\n") for p in metrics_of(workdir)]
  return f"metrics lines {lines}"


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--steps", type=int, default=960)
  parser.add_argument(
    "--what", choices=("run", "study", "hosts"), default="run"
  )
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    soak(
      *(args.what, args.kills, args.seed, pathlib.Path(folder)),
      steps=args.steps,
      log=lambda line: print(line, file=sys.stderr, flush=True),
    )


if __name__ == "__main__":
  main()
