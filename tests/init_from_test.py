"""A run that starts from another: which arrays, and that they are equal."""

import numpy as np
import pytest

import unet_jax.main
from tests import runs

# One step that learns nothing: what it ends with is what it started with.
STILL = ["--config.train.num_steps=1", "--config.optimizer.learning_rate=0"]
STILL += ["--config.optimizer.warmup_steps=0"]


def run(*argv):
  return unet_jax.main.main([str(x) for x in argv])


def refused(capfd, *argv):
  capfd.readouterr()
  assert run(*argv) == 2
  error = capfd.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("error: ")
  return error


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A trained run, and the averages of its best checkpoint."""
  workdir = tmp_path_factory.mktemp("source")
  assert run(*runs.arguments(workdir)) == 0
  lines = [r for r in runs.read_metrics(workdir) if r["split"] == "val"]
  best = max(reversed(lines), key=lambda r: r["dice"])["step"]
  state = runs.read_state(workdir, best)
  return workdir, best, state


def start(workdir, source, *flags):
  flag = f"--config.train.init_from={source}"
  return runs.arguments(workdir, flag, *STILL, *flags)


def averages(state, kind="params"):
  front = f"['ema']['{kind}']"
  return {
    key.removeprefix(front): x for key, x in state.items() if front in key
  }


def parameters(state):
  front = "['params']"
  return {
    key.removeprefix(front): x
    for key, x in state.items()
    if key.startswith(front)
  }


@pytest.fixture(scope="module")
def started(source, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("started")
  slowly = "--config.model.norm_momentum=0.99"
  assert run(*start(workdir, source[0], slowly)) == 0
  return workdir


def test_all_of_another_run(source, started):
  folder, best, state = source
  new = runs.read_state(started, 1)
  want, statistics = averages(state), averages(state, "batch_stats")
  assert parameters(new).keys() == want.keys()
  for key, value in parameters(new).items():
    np.testing.assert_array_equal(value, want[key], err_msg=key)
  for key, value in averages(new).items():
    np.testing.assert_allclose(value, want[key], rtol=1e-6, err_msg=key)
  for key, value in statistics.items():
    # One step moves them by a hundredth; initial ones are far from it.
    moved = new[f"['batch_stats']{key}"]
    np.testing.assert_allclose(moved, value, atol=0.1, err_msg=key)
  report = (started / "init_report.txt").read_text().splitlines()
  assert report[0] == f"{folder}, step {best}"
  assert len(report) == 1 + len(want) + len(statistics)
  assert all(line.startswith("loaded ") for line in report[1:])
  kernel = "params/encoder_0/Conv_0/kernel [3, 3, 1, 2]"
  assert any(line.endswith(kernel) for line in report)


def test_patterns_choose_and_the_report_tells(source, tmp_path):
  """Another head, deeper, without norms: what fits is loaded, all is named."""
  folder, _, state = source
  flags = ["--config.data.num_classes=3", "--config.model.widths=2,4,3"]
  flags += ["--config.model.norm=none"]
  flags += ["--config.train.init_include=*/encoder_*,*/head/*"]
  flags += ["--config.train.init_exclude=*/head/*"]
  assert run(*start(tmp_path, folder, *flags)) == 0
  new, want = parameters(runs.read_state(tmp_path, 1)), averages(state)
  for key, value in new.items():
    loaded = key in want and "encoder" in key
    same = key in want and np.array_equal(value, want[key])
    assert same == loaded or not value.any(), key
  lines = (tmp_path / "init_report.txt").read_text().splitlines()[1:]
  by_kind = {
    kind: [x for x in lines if x.startswith(kind)]
    for kind in ("loaded", "initial value", "left out")
  }
  assert sum(map(len, by_kind.values())) == len(lines)
  assert all("encoder_0" in x or "encoder_1" in x for x in by_kind["loaded"])
  assert any("params/encoder_2/" in x for x in by_kind["initial value"])
  assert any("params/head/kernel" in x for x in by_kind["initial value"])
  assert any("params/encoder_0/BatchNorm_0/" in x for x in by_kind["left out"])
  assert any("batch_stats/decoder/" in x for x in by_kind["left out"])


def test_resuming_never_loads_again(source, started, capfd):
  (started / "init_report.txt").unlink()
  flags = ["--config.model.norm_momentum=0.99", "--config.train.num_steps=2"]
  capfd.readouterr()
  assert run(*start(started, source[0], *flags)) == 0
  assert "resumed from step 1" in capfd.readouterr().err
  assert not (started / "init_report.txt").exists()


def test_mistakes_are_named(source, tmp_path, capfd):
  folder, _, _ = source
  line = refused(capfd, *start(tmp_path, folder, "--config.model.widths=2,5"))
  for words in (
    "params/encoder_1/Conv_0/kernel is (3, 3, 2, 4) there and (3, 3, 2, 5)",
    "batch_stats/encoder_1/BatchNorm_0/mean",
    "params/decoder/up_0/ConvTranspose_0/kernel",
    "init_exclude",
  ):
    assert words in line
  assert "encoder_0" not in line
  for name in ("include", "exclude"):
    flag = f"--config.train.init_{name}=*/encoder_0/*,*/encodr_1/*"
    line = refused(capfd, *start(tmp_path, folder, flag))
    assert f"init_{name}: '*/encodr_1/*' matches no array" in line
    assert "params/head/kernel" in line
  line = refused(capfd, *start(tmp_path, "", "--config.train.init_include=*"))
  assert "train.init_from is empty" in line
  line = refused(capfd, *start(tmp_path, folder / "nothing"))
  assert "init_from" in line
  assert "nothing" in line
  (tmp_path / "empty").mkdir()
  (tmp_path / "empty" / "config.json").write_text("{}")
  line = refused(capfd, *start(tmp_path / "run", tmp_path / "empty"))
  assert "no checkpoint in" in line
  assert "empty" in line
