"""Whole runs on gs://: equal to those on disk, killed or not."""

import json
import signal
import time

import pytest

import unet_jax.main
from tests import gcs, runs
from tests.gcs import bucket  # noqa: F401
from unet_jax.runtime import checkpoint, storage

pytestmark = pytest.mark.usefixtures("bucket")
FLAGS = ["--config.train.num_steps=16"]
FLAGS += ["--config.train.checkpoint_every=4", "--config.train.eval_every=8"]


def start(workdir, *flags, **kwargs):
  return runs.start(*runs.arguments(workdir, *FLAGS, *flags, **kwargs))


def finish(*args, **kwargs):
  status, output = runs.finish(start(*args, **kwargs))
  assert status == 0, output
  return output


def metrics(path, tmp_path):
  """metrics.jsonl of a bucket without what the clock decides."""
  (tmp_path / "metrics.jsonl").write_bytes(gcs.read(f"{path}/metrics.jsonl"))
  return runs.read_metrics(tmp_path)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  """The run on disk that all others must equal."""
  workdir = tmp_path_factory.mktemp("unbroken")
  finish(workdir)
  return workdir


@pytest.fixture(scope="module")
def killed(bucket):  # noqa: F811
  """A run on gs:// that was killed when a checkpoint counted."""
  workdir = bucket("killed")
  process = start(workdir)
  end = time.monotonic() + 120
  while "checkpoints/4/commit_success.txt" not in gcs.names(workdir):
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < end
    time.sleep(0.01)
  process.kill()
  assert runs.finish(process)[0] == -signal.SIGKILL
  return workdir


def test_a_run_that_was_killed_resumes_and_equals_one_on_disk(
  killed, unbroken, tmp_path
):
  output = finish(killed)
  assert "resumed from step" in output
  assert "was not given back by the run on" in output
  assert metrics(killed, tmp_path) == runs.read_metrics(unbroken)
  found = gcs.names(killed)
  for name in ("config.json", "env.json", "pictures/curves.png"):
    assert name in found
  assert sum(name.startswith("tensorboard/") for name in found) == 2
  assert ".lock" not in found
  ours = sorted(n for n in found if n.endswith(f"16/{checkpoint.DIGESTS}"))
  assert ours == ["checkpoints/16/digests.json"]

  # What it learned is the same too, seen by what it predicts.
  summaries = [
    evaluate(workdir, tmp_path) for workdir in (killed, str(unbroken))
  ]
  assert summaries[0] == summaries[1]


def evaluate(workdir, tmp_path):
  argv = ["--workdir", workdir, "--mode", "evaluate", "--step", "16"]
  assert unet_jax.main.main([*argv, "--config.eval.split=test"]) == 0
  name = f"{workdir}/evaluation_test.json"
  return json.loads(
    gcs.read(name) if storage.is_remote(name) else open(name).read()
  )


def test_a_damaged_object_is_found_and_the_step_before_is_used(
  unbroken,
  bucket,  # noqa: F811
  tmp_path,
):
  workdir = bucket("damaged")
  upload(unbroken, workdir)
  name = next(x for x in gcs.names(workdir) if "checkpoints/16/state/d/" in x)
  data = bytearray(gcs.read(f"{workdir}/{name}"))
  data[len(data) // 2] ^= 1
  storage.to_path(f"{workdir}/{name}").write_bytes(bytes(data))
  output = finish(workdir)
  assert f"{name.removeprefix('checkpoints/16/')} is not what was" in output
  assert "resumed from step 12" in output
  assert metrics(workdir, tmp_path) == runs.read_metrics(unbroken)


def upload(folder, target):
  for path in folder.rglob("*"):
    if path.is_file():
      name = path.relative_to(folder).as_posix()
      storage.to_path(f"{target}/{name}").write_bytes(path.read_bytes())
