"""Equal seconds: steps from measured speeds, which are kept."""

import pathlib

from tests import tiny
from unet_jax.studies import budget, run, sweep


def plan(workdir, clock, monkeypatch, seeds=(0, 1)):
  config = tiny.get_config()
  config.study.seeds, config.study.budget = seeds, "seconds"
  measured = []

  def step_seconds(cfg, num_steps):
    measured.append(cfg.model.widths)
    return clock * cfg.model.widths[0]

  monkeypatch.setattr(budget, "step_seconds", step_seconds)
  arms = sweep.baseline({}) + sweep.arm({"model.widths": (6, 8)}, "wide")
  planned = run._plan(config, sweep.check(arms), pathlib.Path(workdir))
  return {x.id: x.cfg.train.num_steps for x in planned}, planned, measured


def test_steps_are_what_the_baselines_seconds_buy(tmp_path, monkeypatch):
  steps, planned, measured = plan(tmp_path, 0.1, monkeypatch)
  # 24 steps of 0.2 s are 8 of 0.6 s.
  expected = {"baseline": 24, "wide": 8}
  assert steps == {f"{k}-s{s}": n for k, n in expected.items() for s in (0, 1)}
  assert measured == [(2, 4), (6, 8)], "an arm once"
  # On a machine that is slower today the study stays what it was.
  again, same, nothing = plan(tmp_path, 7.0, monkeypatch)
  assert again == steps and nothing == []
  assert [run._hash(x.cfg) for x in same] == [run._hash(x.cfg) for x in planned]


def test_a_step_takes_time(monkeypatch):
  from unet_jax import config as config_lib

  cfg = config_lib.parse(tiny.get_config())
  seconds = budget.step_seconds(cfg, 3)
  assert 1e-5 < seconds < 60


def test_parameters_are_counted_in_whole_numbers():
  from unet_jax import config as config_lib

  config = tiny.get_config()
  without, _ = budget.count(config_lib.parse(config))
  config.model.skip = "scalar"  # A factor of no axes for the one skip.
  found, _ = budget.count(config_lib.parse(config))
  assert found == without + 1
  assert type(found) is int and f"{found:,}" == str(found)
