"""The faults that docs/faults.md lists, injected through the command line.

A scenario's test carries its number, `@pytest.mark.fault(N)`, wherever it
stands; the ones that no other file has are here.
"""

import ast
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
from PIL import Image

import unet_jax.main
from benchmarks import long_run
from tests import runs
from unet_jax import train
from unet_jax.runtime import writers

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 24


def run(workdir, *flags, mode="train"):
  return unet_jax.main.main(runs.arguments(workdir, *flags, mode=mode))


@pytest.fixture
def refused(capfd):
  """Runs, expects status 2 and one line that starts with error; returns it."""

  def check(*argv, mode="train"):
    capfd.readouterr()
    assert run(*argv, mode=mode) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in last
    return last

  return check


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("unbroken")
  assert run(workdir) == 0
  return workdir


# --- The table ----------------------------------------------------------------


def marked_tests():
  """{scenario: names of the tests that carry its number}."""
  found = {}
  for path in sorted((ROOT / "tests").rglob("*_test.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      for decorator in getattr(node, "decorator_list", ()):
        text = ast.unparse(decorator)
        if match := re.fullmatch(r"pytest\.mark\.fault\(([\d, ]+)\)", text):
          for number in match[1].split(","):
            found.setdefault(int(number), set()).add(node.name)
  return found


def test_every_scenario_has_a_test_and_the_page_names_it():
  found = marked_tests()
  assert set(found) == set(range(1, 21))
  rows = {}
  for line in (ROOT / "docs" / "faults.md").read_text().splitlines():
    if match := re.match(r"\| (\d+) \|", line):
      rows[int(match[1])] = set(re.findall(r"`(test_\w+)`", line))
  assert rows == found


# --- Checkpoints and signals --------------------------------------------------


@pytest.mark.fault(2)
@pytest.mark.parametrize(
  ("error", "status"),
  [
    (RuntimeError("bug"), 1),
    pytest.param(SystemExit(3), None, marks=pytest.mark.slow),
    pytest.param(KeyboardInterrupt(), 130, marks=pytest.mark.slow),
  ],
)
def test_an_end_right_after_save_loses_nothing(
  unbroken, tmp_path, monkeypatch, error, status
):
  """Saving goes on in the background; whatever ends the run waits for it."""
  save = train._save

  def save_and_end(run, state, window, step, **more):
    save(run, state, window, step, **more)
    if step == 6:
      raise error

  with monkeypatch.context() as patch:
    patch.setattr(train, "_save", save_and_end)
    if status is None:
      with pytest.raises(SystemExit):
        run(tmp_path)
    else:
      assert run(tmp_path) == status
  assert (tmp_path / "checkpoints" / "6").is_dir()
  assert not list((tmp_path / "checkpoints").glob("*tmp*"))
  assert run(tmp_path) == 0
  runs.assert_same_run(unbroken, tmp_path, STEPS)


@pytest.mark.fault(5)
def test_ctrl_c_twice_ends_at_once_and_what_was_saved_is_there(tmp_path):
  flags = ["--config.train.num_steps=100000"]
  process = runs.start(*runs.arguments(tmp_path, *flags))
  for line in process.stdout:
    if line.startswith("step") and " 25/" in line:
      break
  process.send_signal(signal.SIGINT)
  process.send_signal(signal.SIGINT)
  status, output = runs.finish(process, timeout=30)
  # By the signal itself, unless the run had stopped before the second came.
  assert status in (-signal.SIGINT, 130), output
  argv = runs.arguments(tmp_path, mode="evaluate")
  status, output = runs.finish(runs.start(*argv))
  assert status == 0, output


@pytest.mark.fault(9)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
  unbroken, tmp_path, capfd, damage
):
  workdir = tmp_path / "run"
  shutil.copytree(unbroken, workdir)
  state = workdir / "checkpoints" / "24" / "state"
  victim = max((p for p in state.rglob("*") if p.is_file()), key=_size)
  content = bytearray(victim.read_bytes())
  content[len(content) // 2] ^= 1
  if damage == "remove":
    victim.unlink()
  else:
    victim.write_bytes(content if damage == "flip" else content[:-7])
  capfd.readouterr()
  assert run(workdir) == 0
  output = capfd.readouterr().err
  assert re.search(r"checkpoints/24: damaged.*" + victim.name, output)
  assert "resumed from step 21" in output
  runs.assert_same_run(unbroken, workdir, STEPS)


@pytest.mark.fault(9)
def test_a_damaged_checkpoint_ends_a_strict_run(unbroken, tmp_path, refused):
  """Of what would otherwise be used instead, nothing is read or deleted."""
  strict = "--config.runtime.strict_restore=True"
  workdir = tmp_path / "run"
  shutil.copytree(unbroken, workdir)
  assert run(workdir, strict, mode="evaluate") == 0  # Whole: nothing to tell.
  best = json.loads((workdir / "evaluation_val.json").read_text())["step"]
  steps = {p.name for p in (workdir / "checkpoints").glob("[0-9]*")}
  assert {"24", str(best)} < steps or best == 24
  (workdir / "checkpoints" / "24" / "digests.json").unlink()
  error = refused(workdir, strict)
  assert "checkpoints/24: its save did not complete" in error
  assert "config.runtime.strict_restore=False to use 21" in error
  assert {p.name for p in (workdir / "checkpoints").glob("[0-9]*")} == steps
  # The best one, too: its score cannot be trusted, so another would be best.
  damaged = workdir / "checkpoints" / str(best) / "digests.json"
  damaged.write_text("{}")
  error = refused(workdir, strict, mode="evaluate")
  assert f"checkpoints/{best}: damaged, digests.json" in error
  assert run(workdir, mode="evaluate") == 0
  assert run(workdir) == 0
  runs.assert_same_run(unbroken, workdir, STEPS)


def _size(path):
  return path.stat().st_size


@pytest.mark.fault(11)
@pytest.mark.parametrize(
  "step",
  [4, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 5, 13))],
)
def test_resumed_anywhere_in_an_epoch_with_other_workers_is_the_same_run(
  unbroken, tmp_path, monkeypatch, step
):
  """20 examples, 8 a step: step 5 ends an epoch, the others do not."""

  def stop_at(_, now):
    if now == step:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(writers.Progress, "tick", stop_at)
    assert run(tmp_path, "--config.data.num_threads=1") == 143
  assert (tmp_path / "checkpoints" / str(step)).is_dir()
  assert run(tmp_path, "--config.data.num_threads=5") == 0
  runs.assert_same_run(unbroken, tmp_path, STEPS)


@pytest.mark.fault(12)
def test_a_checkpoint_of_another_network_is_refused_by_name(
  unbroken, tmp_path, refused
):
  workdir = tmp_path / "run"
  shutil.copytree(unbroken, workdir)
  config = json.loads((workdir / "config.json").read_text())
  config["model"]["widths"] = [2, 6]
  (workdir / "config.json").write_text(json.dumps(config))
  line = refused(workdir, mode="evaluate")
  assert "(2, 2, 4, 6)" in line or "[6]" in line or "(6,)" in line
  assert len(line) < 3000


# --- A full disk, a folder that cannot be written -----------------------------


@pytest.mark.fault(8)
def test_a_full_disk_in_training_keeps_what_was_saved(tmp_path):
  """With room again the run ends as if nothing had happened."""
  flags = ["--config.train.checkpoint_every=1", "--config.train.num_steps=16"]
  flags += ["--config.train.keep_checkpoints=30"]
  argv = runs.arguments(tmp_path / "unbroken", *flags)
  status, output = runs.finish(runs.start(*argv))
  assert status == 0, output
  with runs.mounted(tmp_path / "disk", "size=700k") as disk:
    argv = runs.arguments(disk / "run", *flags)
    status, output = runs.finish(runs.start(*argv))
    assert status == 2, output
    errors = [x for x in output.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1
    assert str(disk) in errors[0]
    assert "Traceback" not in output
    for record in (disk / "run" / "metrics.jsonl").read_text().splitlines():
      json.loads(record)
    saved = [p.name for p in (disk / "run" / "checkpoints").iterdir()]
    assert saved and all(name.isdigit() for name in saved)
    remount = ["mount", "-o", "remount,size=64m", str(disk)]
    subprocess.run(remount, check=True)
    status, output = runs.finish(runs.start(*argv))
    assert status == 0, output
    assert "resumed from step" in output
    runs.assert_same_run(tmp_path / "unbroken", disk / "run", 16)


@pytest.mark.fault(8)
def test_a_full_disk_in_prediction_leaves_whole_files(
  unbroken, tmp_path, refused
):
  with runs.mounted(tmp_path / "disk", "size=1m") as disk:
    runs.fill(disk, leave=9000)
    flags = ["--output", disk / "out", "--config.predict.probability=true"]
    line = refused(unbroken, *flags, mode="predict")
    assert "space" in line
    paths = list((disk / "out").iterdir())
    assert paths
    for path in paths:
      if path.suffix == ".png":
        Image.open(path).load()
      else:
        np.load(path)


@pytest.mark.fault(20)
def test_a_folder_that_is_read_only_is_refused(tmp_path, refused):
  with runs.mounted(tmp_path / "disk", "size=1m") as disk:
    remount = ["mount", "-o", "remount,ro", str(disk)]
    subprocess.run(remount, check=True)
    line = refused(disk / "run")
    assert str(disk / "run") in line
    assert "Read-only" in line


# --- Data ---------------------------------------------------------------------


def make_folder(root, sizes, *, value=None):
  """Images of noise with a bright half as foreground, one a size."""
  rng = np.random.default_rng(0)
  for kind in ("images", "masks"):
    (root / kind).mkdir(parents=True)
  for i, size in enumerate(sizes):
    mask = np.zeros(size, np.uint8)
    mask[: (size[0] + 1) // 2] = 1
    image = (mask * 90 + rng.integers(0, 60, size)).astype(np.uint8)
    Image.fromarray(image).save(root / "images" / f"{i:02d}.png")
    Image.fromarray(mask).save(root / "masks" / f"{i:02d}.png")
  return root


def folder_flags(root, steps=2):
  return [
    "--config.data.source=folder",
    f"--config.data.dir={root}",
    f"--config.train.num_steps={steps}",
    "--config.optimizer.warmup_steps=0",
    "--config.train.eval_every=0",
    "--config.train.checkpoint_every=0",
  ]


@pytest.mark.fault(13)
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_examples(
  tmp_path, capfd
):
  """One of 16 images has values near the largest float32."""
  root = make_folder(tmp_path / "data", [(16, 16)] * 18)
  (root / "train.txt").write_text("\n".join(f"{i:02d}" for i in range(16)))
  (root / "val.txt").write_text("16\n17")
  (root / "images" / "07.png").unlink()
  huge = np.full((16, 16), 3e38, np.float32)
  huge[::2] = -3e38
  np.save(root / "images" / "07.npy", huge)
  flags = [*folder_flags(root, steps=8), "--config.data.normalize=none"]
  workdir = tmp_path / "run"
  assert run(workdir, *flags) == 0
  output = capfd.readouterr().err
  named = [x for x in output.splitlines() if "not finite" in x]
  assert len(named) == 4  # Of 8 steps of 8 of 16 examples.
  assert all("07" in x for x in named)
  record = [r for r in runs.read_metrics(workdir) if r["split"] == "train"][-1]
  assert record["skipped"] == 4
  for key, value in runs.read_state(workdir, 8).items():
    assert np.isfinite(value).all(), key


@pytest.mark.fault(17)
def test_images_of_any_size_train_and_are_predicted(tmp_path, refused):
  sizes = [(1, 1), (8, 8), (1, 40), (20, 20), (33, 2), (3, 3), (16, 16)]
  root = make_folder(tmp_path / "data", sizes)
  (root / "train.txt").write_text("\n".join(f"{i:02d}" for i in range(6)))
  (root / "val.txt").write_text("\n".join(f"{i:02d}" for i in range(7)))
  (root / "train.txt").write_text("06")
  (root / "val.txt").write_text("\n".join(f"{i:02d}" for i in range(6)))
  workdir = tmp_path / "run"
  assert run(workdir, *folder_flags(root)) == 0
  out = tmp_path / "out"
  flags = ["--input", root / "images", "--output", out]
  assert run(workdir, *flags, mode="predict") == 0
  for i, size in enumerate(sizes):
    mask = np.asarray(Image.open(out / f"{i:02d}_mask.png"))
    assert mask.shape == size
  Image.new("1", (20000, 20000)).save(root / "images" / "large.png")
  line = refused(workdir, *flags, mode="predict")
  assert "large.png" in line
  assert "pixels" in line


@pytest.mark.fault(18)
def test_a_split_without_examples_is_refused_before_step_1(tmp_path, refused):
  root = make_folder(tmp_path / "data", [(16, 16)] * 3)
  for empty in ("train", "val"):
    for split in ("train", "val"):
      stems = "" if split == empty else "00\n01"
      (root / f"{split}.txt").write_text(stems)
    line = refused(tmp_path / empty, *folder_flags(root))
    assert f"{empty}.txt" in line


@pytest.mark.fault(18)
def test_few_examples_and_splits_of_background_alone(tmp_path):
  """Three examples fill batches of 8; a class that is absent has no score."""
  root = make_folder(tmp_path / "data", [(16, 16)] * 4)
  Image.new("L", (16, 16)).save(root / "masks" / "03.png")
  (root / "train.txt").write_text("00\n01\n02")
  (root / "val.txt").write_text("03")
  assert run(tmp_path / "run", *folder_flags(root)) == 0
  record = runs.read_metrics(tmp_path / "run")[-1]
  assert record["split"] == "val"
  if record["dice"] is not None:  # What was predicted there is wrong.
    assert record["dice"] == 0.0
  assert record["num_images"] == 1


# --- Another machine, a long time ---------------------------------------------


def test_another_environment_is_told_when_a_run_goes_on(
  unbroken, tmp_path, capfd
):
  workdir = tmp_path / "run"
  shutil.copytree(unbroken, workdir)
  env = json.loads((workdir / "env.json").read_text())
  env["versions"]["jax"] = "0.0.1"
  env["cpu_count"] = 4096
  (workdir / "env.json").write_text(json.dumps(env))
  capfd.readouterr()
  assert run(workdir) == 0
  output = capfd.readouterr().err
  assert "warning: cpu_count was 4096, now" in output
  assert "warning: versions was" in output and "0.0.1" in output
  assert json.loads((workdir / "env.json").read_text())["cpu_count"] < 4096


@pytest.mark.slow
def test_a_long_run_stays_as_small_as_it_was():
  """2,000 steps with 80 evaluations, saves and pictures."""
  result = long_run.run(2000)
  early, late = result["resident_bytes"]
  assert late < 1.03 * early + 5e6
  assert result["files"][1] <= result["files"][0] + 1
  assert result["threads"][1] <= result["threads"][0] + 1
