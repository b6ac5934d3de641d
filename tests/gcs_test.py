"""Whole runs on gs://: equal to those on disk, killed or not."""

import json
import signal
import time

import numpy as np
import pytest
from PIL import Image

import unet_jax.main
from tests import gcs, runs
from tests.gcs import bucket  # noqa: F401
from unet_jax.errors import UserError
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
  path = storage.to_path(workdir) / "evaluation_test.json"
  return json.loads(path.read_text())


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


def test_data_and_results_on_gs(bucket, tmp_path, capfd):  # noqa: F811
  rng = np.random.default_rng(0)
  for kind in ("images", "masks"):
    (tmp_path / kind).mkdir()
    for i in range(10):
      pixels = rng.integers(0, 2, (16, 16)).astype(np.uint8)
      if i % 2:
        np.save(tmp_path / kind / f"{i}.npy", pixels)
      else:
        Image.fromarray(pixels).save(tmp_path / kind / f"{i}.png")
  (tmp_path / "val.txt").write_text("\ufeff8\r\n9\r\n", encoding="utf-8")
  (tmp_path / "train.txt").write_text("".join(f"{i}\n" for i in range(8)))
  data, workdir = bucket("data"), bucket("folder")
  upload(tmp_path, data)
  flags = ["--config.data.source=folder", f"--config.data.dir={data}"]
  assert unet_jax.main.main(runs.arguments(workdir, *FLAGS, *flags)) == 0
  out = bucket("out")
  argv = ["--workdir", workdir, "--mode", "predict", "--output", out]
  assert unet_jax.main.main([*argv, "--input", f"{data}/images"]) == 0
  assert len([x for x in gcs.names(out) if x.endswith("_mask.png")]) == 10
  argv = ["--workdir", workdir, "--mode", "describe"]
  assert unet_jax.main.main(argv) == 0
  assert "network.svg" in gcs.names(workdir)


def test_what_is_wrong_is_one_line(monkeypatch, capfd):
  argv = runs.arguments("gs://no-such-bucket/run")
  assert unet_jax.main.main(argv) == 2
  assert "error: cannot read gs://no-such-bucket" in capfd.readouterr().err
  storage._prepare.cache_clear()
  monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
  assert unet_jax.main.main(argv) == 2
  assert "pip install unet_jax[gcs]" in capfd.readouterr().err
  storage._prepare.cache_clear()


def test_the_mirror_sends_what_changed_until_another_run_owns_it(
  bucket,  # noqa: F811
  monkeypatch,
):
  target = storage.to_path(bucket("mirror"))
  mirror = storage.Mirror(target)
  with storage.owned(target, print):
    (mirror.folder / "metrics.jsonl").write_text("1")
    mirror.upload()
    assert gcs.read(f"{target}/metrics.jsonl") == b"1"
    (mirror.folder / "metrics.jsonl").write_text("12")
    monkeypatch.setattr(storage, "_ME", "another")
    with pytest.raises(UserError, match="another run writes"):
      storage.write_whole(target / ".lock", b"a third")
      mirror.upload()
    assert gcs.read(f"{target}/metrics.jsonl") == b"1"
  with pytest.raises(UserError):
    mirror.close()
  assert not mirror.folder.exists()
