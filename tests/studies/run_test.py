"""The runner: what is done stays, what was killed resumes, faults are told."""

import json
import os
import pathlib
import signal
import subprocess
import time

import numpy as np
import pytest

from tests import runs, tiny
from unet_jax import config as config_lib
from unet_jax.runtime import writers
from unet_jax.studies import run, statistics

ROOT = pathlib.Path(__file__).parents[2]
STUDY = str(ROOT / "tests" / "tiny_study.py")


def start(workdir, *flags, config=STUDY):
  return runs.start(
    *("--mode", "ablate", "--config", config, "--workdir", workdir, *flags),
    env={"PYTHONPATH": str(ROOT)},
  )


def without_clock(record):
  """A record but for what the clock decides."""
  return {k: v for k, v in record.items() if "second" not in k and k != "git"}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("study")
  status, output = runs.finish(start(workdir))
  assert status == 0, output
  return workdir


def test_every_arm_has_every_seed_the_first_seed_first(study):
  records = run.read_results(study)
  ids = [r["id"] for r in records]
  assert ids == [
    *("concat-s0", "skip=none-s0", "skip=add-s0"),
    *("concat-s1", "skip=none-s1", "skip=add-s1"),
  ]
  assert [r["baseline"] for r in records[:3]] == [True, False, False]
  for record in records:
    folder = study / "runs" / record["id"]
    config = json.loads((folder / "config.json").read_text())
    assert config["seed"] == record["seed"]
    for key, value in record["overrides"].items():
      section, name = key.split(".")
      assert config[section][name] == value
    # As evaluating the same checkpoint on its own says.
    assert record["split"] == "test" and len(record["per_image"]) == 5
    assert record["curve"][-1][0] == 6
    assert record["memory_bytes"] > 4 * record["params"]
    assert record["seconds"] > 0
    # With compilation and evaluation: more than the steps alone.
    lines = writers.read_jsonl(folder / "metrics.jsonl")
    for clock in ("wall_seconds", "cpu_seconds"):
      assert record[clock] == pytest.approx(sum(x[clock] for x in lines), 0.01)
    assert record["wall_seconds"] > record["seconds"]
    assert 0 < record["cpu_seconds"]
  assert {r["params"] for r in records if r["arm"] == "concat"} == {463}
  assert len({r["config_hash"] for r in records}) == 6


def test_the_score_is_that_of_evaluate(study):
  record = run.read_results(study)[1]
  folder = study / "runs" / record["id"]
  process = runs.start(
    *("--workdir", folder, "--mode", "evaluate", "--config.eval.split=test")
  )
  assert runs.finish(process)[0] == 0
  evaluation = json.loads((folder / "evaluation_test.json").read_text())
  for key in ("dice", "iou", "dice_per_image", "loss"):
    assert evaluation[key] == record["metrics"][key]
  assert evaluation["step"] == record["step"]


def test_the_difficult_images_are_the_same_in_every_arm(study):
  records = {r["id"]: r for r in run.read_results(study)}
  rows = records["concat-s0"]["per_image"]
  expected = sorted(rows, key=lambda row: row["dice"])[:2]
  for record in records.values():
    path = study / "runs" / record["id"] / "difficult.npz"
    assert path.exists() == (record["seed"] == 0)
    if path.exists():
      kept = np.load(path)
      names = {str(kept[f"name_{k}"]) for k in range(2)}
      assert names == {row["name"] for row in expected}
      assert kept["weight_0"].all() and kept["weight_0"].shape == (16, 16)
      assert kept["prediction_0"].shape == kept["label_0"].shape == (16, 16)


def test_a_run_is_known_by_what_its_numbers_depend_on(monkeypatch):
  cfg = config_lib.parse(tiny.get_config())
  known = run._hash(cfg)
  other = {"seeds": (7,), "margin": 0.5}
  assert run._hash(config_lib.parse(changed(study=other))) == known
  assert run._hash(config_lib.parse(changed(optimizer={"b2": 0.9}))) != known
  # A later version's sections have more fields.
  to_dict = config_lib.to_dict
  monkeypatch.setattr(
    config_lib, "to_dict", lambda c: {**to_dict(c), "study": {"new": 1}}
  )
  assert run._hash(cfg) == known


def changed(**sections):
  config = tiny.get_config()
  for section, values in sections.items():
    for key, value in values.items():
      setattr(config[section], key, value)
  return config


def test_what_is_done_is_not_done_again(study):
  before = (study / "results.jsonl").read_bytes()
  status, output = runs.finish(start(study))
  assert status == 0 and "6 done, 0 to do" in output
  assert (study / "results.jsonl").read_bytes() == before


def test_killed_and_started_again_is_the_same_study(study, tmp_path):
  """SIGKILL twice, at different places; records equal but for the clock."""
  for wanted in (1, 4):
    process = start(tmp_path)
    path, end = tmp_path / "results.jsonl", time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
      if path.exists() and path.read_bytes().count(b"\n") >= wanted:
        break
      time.sleep(0.01)
    time.sleep(0.4 * wanted)  # Into the next run.
    os.kill(process.pid, signal.SIGKILL)
    runs.finish(process)
  status, output = runs.finish(start(tmp_path))
  assert status == 0, output
  expected = map(without_clock, run.read_results(study))
  assert list(map(without_clock, run.read_results(tmp_path))) == list(expected)


@pytest.mark.fault(3)
def test_sigterm_saves_and_the_study_goes_on(tmp_path):
  process = start(tmp_path, "--config.train.num_steps=2000")
  metrics = tmp_path / "runs" / "concat-s0" / "metrics.jsonl"
  end = time.monotonic() + 120
  while not (metrics.exists() and metrics.read_text().count("\n") > 1):
    assert time.monotonic() < end
    time.sleep(0.02)
  os.kill(process.pid, signal.SIGTERM)
  status, output = runs.finish(process)
  assert status == 143, output
  assert list((tmp_path / "runs" / "concat-s0" / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
def test_shards_share_the_runs(study, tmp_path):
  processes = [start(tmp_path, f"--shard={i}/2") for i in (0, 1)]
  for process in processes:
    status, output = runs.finish(process)
    assert status == 0, output
    assert "3 to do here" in output
  key = lambda record: record["id"]
  got = sorted(map(without_clock, run.read_results(tmp_path)), key=key)
  expected = sorted(map(without_clock, run.read_results(study)), key=key)
  assert got == expected


def test_a_shard_that_starts_again_keeps_its_own_runs(study, tmp_path):
  """Though the other has done some meanwhile."""
  for record in run.read_results(study)[1::2][:1]:  # Of shard 1, one is done.
    (tmp_path / "results-1-of-2.jsonl").write_text(json.dumps(record) + "\n")
  status, output = runs.finish(start(tmp_path, "--shard=0/2", "--dry-run"))
  assert status == 0, output
  named = [x.split(":")[0] for x in output.splitlines() if "MACs" in x]
  ids = [r["id"] for r in run.read_results(study)]
  assert named[:3] == ids[0::2]
  assert "6 runs, 1 done, 3 to do here" in output


def test_a_study_has_one_writer(tmp_path):
  first = start(tmp_path, "--config.train.num_steps=2000")
  metrics = tmp_path / "runs" / "concat-s0" / "metrics.jsonl"
  end = time.monotonic() + 120
  while not metrics.exists():
    assert time.monotonic() < end and first.poll() is None
    time.sleep(0.02)
  status, output = runs.finish(start(tmp_path, "--config.train.num_steps=2000"))
  assert status == 2 and "another run is writing" in output
  os.kill(first.pid, signal.SIGTERM)
  assert runs.finish(first)[0] == 143


def study_file(tmp_path, arms, *lines):
  path = tmp_path / "study.py"
  path.write_text(
    "from tests import tiny_study\n"
    "from unet_jax.studies.sweep import *\n"
    "def get_config():\n"
    "  config = tiny_study.get_config()\n"
    "  config.study.seeds = (0,)\n"
    + "".join(f"  {line}\n" for line in lines)
    + "  return config\n"
    f"def sweep():\n  return {arms}\n"
  )
  return str(path)


def test_a_failing_arm_is_recorded_and_the_rest_goes_on(tmp_path):
  config = study_file(
    tmp_path,
    "baseline({}) + arm({'optimizer.learning_rate': 1e38}, 'wild')"
    " + grid({'model.skip': ('add',)})",
    "config.train.max_skipped = 1",
  )
  status, output = runs.finish(start(tmp_path / "w", config=config))
  assert status == 2, output
  records = {r["arm"]: r for r in run.read_results(tmp_path / "w")}
  assert {k: r["status"] for k, r in records.items()} == {
    "baseline": "done",
    "wild": "failed",
    "skip=add": "done",
  }
  assert "not finite" in records["wild"]["reason"]
  assert "1 of 3 runs failed (wild-s0)" in output.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.fault(8)
def test_a_full_disk_is_no_fault_of_an_arm(study, tmp_path):
  """It ends the study; with room again all arms are there and as they are."""
  with runs.mounted(tmp_path / "disk", "size=1m") as disk:
    status, output = runs.finish(start(disk / "w"))
    assert status == 2, output
    assert str(disk) in output.splitlines()[-1], output
    done = run.read_results(disk / "w")
    assert len(done) < 6 and {r["status"] for r in done} <= {"done"}
    remount = ["mount", "-o", "remount,size=64m", str(disk)]
    subprocess.run(remount, check=True)
    status, output = runs.finish(start(disk / "w"))
    assert status == 0, output
    expected = list(map(without_clock, run.read_results(study)))
    assert list(map(without_clock, run.read_results(disk / "w"))) == expected


def test_equal_macs_give_dearer_arms_fewer_steps(tmp_path):
  config = study_file(
    tmp_path,
    "baseline({}) + arm({'model.widths': (4, 8)}, 'wide')",
    "config.study.budget = 'macs'",
    "config.train.num_steps = 24",
  )
  status, output = runs.finish(
    start(tmp_path / "w", "--dry-run", config=config)
  )
  assert status == 0, output
  found = {}
  for line in output.splitlines():
    if "parameters" in line:
      words = line.replace(",", "").split()
      found[words[0]] = (int(words[3]), int(words[5]))
  (cheap, steps), (dear, fewer) = found["baseline-s0:"], found["wide-s0:"]
  assert steps == 24 and dear > 3 * cheap
  assert fewer == max(1, round(24 * cheap / dear))
  assert not (tmp_path / "w" / "results.jsonl").exists()


@pytest.mark.parametrize(
  ("arms", "flags", "words"),
  [
    ("grid({'model.skip': ('add',)})", (), "0 arms are the baseline"),
    (
      "baseline({'model.skip': 'nope'})",
      (),
      "arm 'baseline': config.model.skip",
    ),
    ("baseline({})", ("--shard=2/2",), "--shard 2/2"),
    ("undefined", (), "NameError"),
    ("baseline({})", ("--config.study.seeds=1,1",), "give different ones"),
  ],
)
def test_a_wrong_study_is_refused_in_one_line(tmp_path, arms, flags, words):
  config = study_file(tmp_path, arms)
  status, output = runs.finish(start(tmp_path / "w", *flags, config=config))
  assert status == 2
  (line,) = [x for x in output.splitlines() if x.startswith("error: ")]
  assert words in line


def test_a_folder_of_another_study_is_refused(study):
  status, output = runs.finish(start(study, "--config.train.batch_size=4"))
  assert status == 2
  assert "holds concat-s0 with another config" in output


@pytest.mark.slow
def test_ten_arms_of_three_seeds_take_less_than_three_minutes(tmp_path):
  """Among them the information controls; zeros must not beat concat."""
  config = study_file(
    tmp_path,
    "baseline({}, 'concat') + grid({'model.skip': ('none', 'add', 'mul',"
    " 'proj', 'scalar', 'se', 'zeros', 'shuffle', 'dup')})",
    "config.study.seeds = (0, 1, 2)",
  )
  begin = time.monotonic()
  status, output = runs.finish(start(tmp_path / "w", config=config), 180)
  assert status == 0, output
  assert time.monotonic() - begin < 180
  records = run.read_results(tmp_path / "w")
  assert len(records) == 30 and all(r["status"] == "done" for r in records)
  arms = {}
  for record in records:
    rows = [row["dice"] for row in record["per_image"]]
    arms.setdefault(record["arm"], []).append(rows)
  arms = {k: np.array(v) for k, v in arms.items()}
  assert all(scores.shape == (3, 5) for scores in arms.values())
  found = statistics.compare(arms, "concat", 0.01)
  assert len(found) == 9
  assert all(np.isfinite(x.p_holm) for x in found.values())
