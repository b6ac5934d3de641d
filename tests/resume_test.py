"""Exact resume: however a run ends, started again it gives the same bits."""

import json
import os
import signal
import time

import numpy as np
import pytest
from PIL import Image

import unet_jax.main
from tests import runs
from unet_jax import config as config_lib
from unet_jax import evaluate, predict, run_log
from unet_jax.data import pipeline

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
  while True:
    ended = process.poll() is not None
    if condition():
      return
    assert not ended, process.communicate()
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
  """Whether the save of `step` or a later one is on its way, or just done.

  The poll sees most saves as they are written; on a busy machine it may be
  late, and then finds what was committed.
  """
  folder = workdir / "checkpoints"

  def condition():
    return any(int(p.name.split(".")[0]) >= step for p in folder.glob("[0-9]*"))

  return condition


def test_metrics_lines_are_whole_and_in_order(unbroken):
  records = runs.read_metrics(unbroken)
  train = [r["step"] for r in records if r["split"] == "train"]
  val = [r["step"] for r in records if r["split"] == "val"]
  assert train == [5, 10, 15, 20, 24]
  assert val == [8, 16, 24]
  assert [r["step"] for r in records] == sorted(train + val)


@pytest.mark.fault(1)
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


@pytest.mark.fault(3, 5)
@pytest.mark.parametrize(
  ("signum", "status"),
  [
    (signal.SIGTERM, 143),
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
  ],
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


# --- Stopped at moments that a signal from outside hardly hits ----------------


@pytest.fixture(scope="module")
def unbroken_here(tmp_path_factory):
  """The unbroken run on the 8 devices of this process."""
  workdir = tmp_path_factory.mktemp("unbroken_here")
  assert run_here(workdir) == 0
  return workdir


def run_here(workdir, *flags):
  return unet_jax.main.main(runs.arguments(workdir, *flags))


def signalled(function, when=lambda *args: True):
  """`function`, but a SIGTERM arrives just before it."""

  def wrapper(*args, **kwargs):
    if when(*args):
      os.kill(os.getpid(), signal.SIGTERM)
    return function(*args, **kwargs)

  return wrapper


@pytest.mark.fault(3)
def test_stopped_in_an_evaluation_twice(unbroken_here, tmp_path, monkeypatch):
  """The evaluation is made up for, and its state is not lost meanwhile."""
  flags = ["--config.train.keep_checkpoints=1"]
  for _ in range(2):
    with monkeypatch.context() as patch:
      patch.setattr(evaluate, "evaluate", signalled(evaluate.evaluate))
      assert run_here(tmp_path, *flags) == 143
    assert (tmp_path / "checkpoints" / "8").is_dir()
    assert runs.read_metrics(tmp_path)[-1]["split"] == "train"
  assert run_here(tmp_path, *flags) == 0
  runs.assert_same_run(unbroken_here, tmp_path, STEPS)


def test_stopped_after_the_sums_were_read_is_saved(
  unbroken_here, tmp_path, monkeypatch
):
  """Step 5 is one to log and not one to save; a signal arrives in between."""
  with monkeypatch.context() as patch:
    late = signalled(run_log.RunLog.train, lambda log, step, *_: step == 5)
    patch.setattr(run_log.RunLog, "train", late)
    assert run_here(tmp_path) == 143
  assert (tmp_path / "checkpoints" / "5").is_dir()
  assert run_here(tmp_path) == 0
  runs.assert_same_run(unbroken_here, tmp_path, STEPS)


@pytest.mark.fault(14)
def test_a_damaged_image_ends_the_run_at_the_step_that_needs_it(
  tmp_path, capfd
):
  """It is read ahead of that step; what the steps before give is not lost."""
  data = tmp_path / "data"
  rng = np.random.default_rng(0)
  stems = [f"{i:02d}" for i in range(16)]
  for folder in ("images", "masks"):
    (data / folder).mkdir(parents=True)
    for stem in stems:
      pixels = rng.integers(0, 2, (16, 16)).astype(np.uint8)
      Image.fromarray(pixels).save(data / folder / f"{stem}.png")
  (data / "train.txt").write_text("\n".join(stems[1:]))
  (data / "val.txt").write_text(stems[0])
  flags = [
    "--config.data.source=folder",
    f"--config.data.dir={data}",
    "--config.train.checkpoint_every=1",
    "--config.train.eval_every=0",
    "--config.optimizer.warmup_steps=0",
  ]
  cfg = config_lib.load_config(runs.CONFIG)
  cfg.data.source, cfg.data.dir = "folder", str(data)
  cfg = config_lib.parse(cfg)
  source = pipeline.make_source(cfg, "train", tmp_path)
  ids = [
    batch["id"]
    for batch in pipeline.train_batches(
      source, {"mode": "image"}, cfg=cfg, first_step=0, end_step=2
    )
  ]
  # 8 of 15 examples a step: some are needed by step 2 and not by step 1.
  first_needed = sorted(set(ids[1].tolist()) - set(ids[0].tolist()))[0]
  path = data / "images" / f"{source.names[first_needed]}.png"
  whole = path.read_bytes()
  path.write_bytes(whole[:-30])  # The header is as it was.

  assert run_here(tmp_path / "run", *flags, "--config.train.num_steps=1") == 0
  assert run_here(tmp_path / "run", *flags, "--config.train.num_steps=3") == 2
  assert path.name in capfd.readouterr().err.splitlines()[-1]
  fresh = [*flags, "--config.train.num_steps=3"]
  assert run_here(tmp_path / "fresh", *fresh) == 2
  saved = tmp_path / "fresh" / "checkpoints"
  assert [p.name for p in saved.iterdir() if p.name.isdigit()] == ["1"]
  path.write_bytes(whole)
  assert run_here(tmp_path / "fresh", *fresh) == 0


@pytest.mark.fault(3)
@pytest.mark.parametrize(
  ("mode", "module", "name"),
  [("evaluate", evaluate, "evaluate"), ("predict", predict, "_write")],
)
def test_evaluation_and_prediction_stop_between_batches(
  unbroken_here, monkeypatch, capfd, mode, module, name
):
  monkeypatch.setattr(module, name, signalled(getattr(module, name)))
  argv = runs.arguments(unbroken_here, mode=mode)
  assert unet_jax.main.main(argv) == 143
  assert "start again with" in capfd.readouterr().err.splitlines()[-1]
  assert not (unbroken_here / "evaluation_val.json").exists()
  masks = list((unbroken_here / "predictions").glob("*_mask.png"))
  assert len(masks) == (1 if mode == "predict" else 0), "of five"


def test_an_evaluation_of_the_training_split_is_told_from_a_train_line(
  tmp_path,
):
  config = config_lib.load_config(runs.CONFIG)
  config.eval.split = "train"
  line = {"step": 5, "split": "train", "loss": 0.5}
  for more, expected in (({}, False), ({"num_images": 3}, True)):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line | more) + "\n")
    cfg = config_lib.parse(config)
    log = run_log.RunLog(cfg, tmp_path, None, 5)
    assert log.has(5) == expected
    assert not log.has(4)
    log.close()


def test_a_run_that_failed_before_its_first_checkpoint_binds_nothing(
  tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    patch.setattr(run_log, "add_sums", None)  # Any crash: a bug, exit 1.
    assert run_here(tmp_path) == 1
  flags = [
    "--config.optimizer.learning_rate=0.001",
    "--config.train.num_steps=2",
  ]
  assert run_here(tmp_path, *flags) == 0


@pytest.mark.slow
def test_the_demo_reaches_its_score(tmp_path):
  argv = ["--config", "configs/synthetic.py", "--workdir", tmp_path]
  status, output = runs.finish(runs.start(*argv), timeout=900)
  assert status == 0, output
  argv = ["--workdir", tmp_path, "--mode", "evaluate"]
  argv += ["--config.eval.split=test"]
  status, output = runs.finish(runs.start(*argv))
  assert status == 0, output
  scores = json.loads((tmp_path / "evaluation_test.json").read_text())
  assert scores["dice"] >= 0.95
