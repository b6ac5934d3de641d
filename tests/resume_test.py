"""Exact resume: however a run ends, started again it gives the same bits."""

import json
import signal
import time

import pytest

from tests import runs

STEPS = 24


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("unbroken")
  status, output = runs.finish(runs.start(*runs.arguments(workdir)))
  assert status == 0, output
  return workdir


def wait_for(condition, process, seconds=120):
  """Polls fast, so that a kill hits the moment; fails if the process ends."""
  end = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < end
    time.sleep(0.001)


def reached(workdir, step):
  """Whether a metrics line of `step` or later is on disk."""
  path = workdir / "metrics.jsonl"

  def condition():
    if not path.exists():
      return False
    lines = path.read_text().splitlines()
    return bool(lines) and json.loads(lines[-1])["step"] >= step

  return condition


def saving(workdir, step):
  """Whether the save of `step` is on its way."""
  folder = workdir / "checkpoints"
  return lambda: any(folder.glob(f"{step}.orbax-checkpoint-tmp*"))


def test_metrics_lines_are_whole_and_in_order(unbroken):
  records = runs.read_metrics(unbroken)
  train = [r["step"] for r in records if r["split"] == "train"]
  val = [r["step"] for r in records if r["split"] == "val"]
  assert train == [5, 10, 15, 20, 24]
  assert val == [8, 16, 24]
  assert [r["step"] for r in records] == sorted(train + val)


def test_killed_at_any_moment_and_resumed_is_the_same_run(unbroken, tmp_path):
  """SIGKILL three times: during a save, after a line, during a later save."""
  moments = [saving(tmp_path, 6), reached(tmp_path, 10), saving(tmp_path, 18)]
  for moment in moments:
    process = runs.start(*runs.arguments(tmp_path))
    wait_for(moment, process)
    process.kill()
    assert runs.finish(process)[0] == -signal.SIGKILL
  status, output = runs.finish(runs.start(*runs.arguments(tmp_path)))
  assert status == 0, output
  assert "resumed from step" in output
  runs.assert_same_run(unbroken, tmp_path, STEPS)
  assert not list((tmp_path / "checkpoints").glob("*tmp*"))


@pytest.mark.parametrize(
  ("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_stopped_politely_saves_and_says_how_to_resume(
  unbroken, tmp_path, signum, status
):
  process = runs.start(*runs.arguments(tmp_path))
  wait_for(reached(tmp_path, 5), process)
  process.send_signal(signum)
  got, output = runs.finish(process)
  assert got == status, output
  last = output.splitlines()[-1]
  assert "the state was saved" in last
  assert f"--workdir {tmp_path}" in last
  got, output = runs.finish(runs.start(*runs.arguments(tmp_path)))
  assert got == 0, output
  assert "resumed from step" in output
  runs.assert_same_run(unbroken, tmp_path, STEPS)


def test_a_finished_run_has_nothing_to_do_and_changes_nothing(unbroken):
  before = (unbroken / "metrics.jsonl").read_bytes()
  status, output = runs.finish(runs.start(*runs.arguments(unbroken)))
  assert status == 0, output
  assert (unbroken / "metrics.jsonl").read_bytes() == before


def test_config_json_alone_repeats_the_run_to_the_bit(unbroken, tmp_path):
  config = unbroken / "config.json"
  argv = ["--config", config, "--workdir", tmp_path]
  status, output = runs.finish(runs.start(*argv))
  assert status == 0, output
  runs.assert_same_run(unbroken, tmp_path, STEPS)
