"""Searches: TPE as Optuna does it, resumed from nothing but the results."""

import math
import sys

import optuna
import pytest

from tests import tiny
from unet_jax.errors import UserError
from unet_jax.studies import report, run, sweep, tpe

SPACE = {
  "optimizer.learning_rate": sweep.log_uniform(1e-4, 1.0),
  "model.widths": ((2, 4), (3, 6), (4, 8)),
}


def quality(overrides):
  """Best at 1e-2 with the last widths."""
  off = abs(math.log10(overrides["optimizer.learning_rate"]) + 2)
  return overrides["model.widths"][0] - off


def explore(search, trials, score=quality):
  found, scores = [], []
  for _ in range(trials):
    found.append(tpe.suggest(search, scores))
    scores.append(score(found[-1]))
  return found, scores


def test_trials_are_those_of_one_unbroken_optuna_study():
  search = sweep.search(SPACE, 15, seed=3)
  found, _ = explore(search, 15)
  sampler = optuna.samplers.TPESampler(seed=3)
  study = optuna.create_study(direction="maximize", sampler=sampler)
  for expected in found:
    trial = study.ask()
    key = "optimizer.learning_rate"
    rate = trial.suggest_float(key, 1e-4, 1.0, log=True)
    k = trial.suggest_categorical("model.widths", range(3))
    own = {key: sweep.shorten(rate), "model.widths": SPACE["model.widths"][k]}
    assert own == expected
    study.tell(trial, quality(own))
  assert explore(search, 3)[0] == found[:3]
  assert explore(sweep.search(SPACE, 3, seed=4), 3)[0] != found[:3]


def test_it_learns_from_the_scores_and_bears_failures():
  fails = lambda x: None if x["model.widths"] == (3, 6) else quality(x)
  _, scores = explore(sweep.search(SPACE, 40), 40, fails)
  mean = lambda xs: sum(x for x in xs if x is not None) / len(xs)
  assert mean(scores[-15:]) > mean(scores[:10]) + 0.5
  assert None in scores[:10] and scores[-15:].count(None) < 5


def test_without_optuna_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "optuna", None)
  with pytest.raises(UserError, match=r"pip install -e \.\[optuna\]"):
    tpe.suggest(sweep.search(SPACE, 2), [])


@pytest.mark.parametrize(
  ("space", "trials"), [({}, 3), (SPACE, 0), ({"model.skip": ()}, 3)]
)
def test_a_search_of_nothing_is_refused(space, trials):
  with pytest.raises(UserError, match="sweep: "):
    sweep.search(space, trials)


def config():
  base = tiny.get_config()
  base.train.num_steps, base.train.eval_every = 4, 2
  base.study.seeds, base.study.num_pictures = (0,), 0
  return base


def test_trials_follow_the_scores_and_what_is_recorded_stays(
  tmp_path, monkeypatch
):
  """With a stand-in for training: the scores, and one failure, are known."""
  trained = []

  def run_one(item, workdir):
    trained.append(item.id)
    record = {"id": item.id, "arm": item.arm.name, "seed": item.seed}
    record |= {"overrides": dict(item.arm.overrides)}
    record |= {"config_hash": run._hash(item.cfg), "reason": "bad luck"}
    if item.arm.name.startswith("trial_001"):
      return {**record, "status": "failed"}
    score = item.cfg.optimizer.learning_rate + item.seed
    return {**record, "status": "done", "best_score": score}

  monkeypatch.setattr(run, "_run_one", run_one)
  base = config()
  base.study.seeds = (0, 2)
  space = {"optimizer.learning_rate": sweep.log_uniform(1e-4, 1e-1)}
  search = sweep.search(space, 4, seed=1)
  run.run(base, search, tmp_path)
  assert len(trained) == 10 and trained[:2] == ["baseline-s0", "baseline-s2"]
  rates = [r["overrides"] for r in run.read_results(tmp_path)[2::2]]
  scores = [rate["optimizer.learning_rate"] + 1 for rate in rates]
  scores[1] = None
  for k in range(4):
    assert rates[k] == tpe.suggest(search, scores[:k])
  # Nothing is done again, failed or not; a longer search goes on from there.
  trained.clear()
  run.run(base, search, tmp_path)
  assert trained == []
  run.run(base, sweep.search(space, 5, seed=1), tmp_path)
  assert len(trained) == 2
  assert all(name.startswith("trial_004") for name in trained)


def without_clock(record):
  return {k: v for k, v in record.items() if "second" not in k and k != "git"}


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_killed(tmp_path):
  """Its state is its results: two are left, the others are found again."""
  space = {"optimizer.learning_rate": sweep.log_uniform(1e-4, 1e-1)}
  search = sweep.check(sweep.search(space, 3, seed=1))
  run.run(config(), search, tmp_path / "a")
  records = run.read_results(tmp_path / "a")
  assert records[0]["arm"] == "baseline"
  assert [r["arm"][:9] for r in records[1:]] == [
    f"trial_00{k}" for k in range(3)
  ]
  for record in records:
    best = max(value for _, value in record["curve"])
    assert record["best_score"] == best and record["split"] == "test"
  scores = [r["best_score"] for r in records[1:]]
  for k in range(3):
    assert records[k + 1]["overrides"] == tpe.suggest(search, scores[:k])

  (tmp_path / "b").mkdir()
  lines = (tmp_path / "a" / "results.jsonl").read_text().splitlines(True)
  (tmp_path / "b" / "results.jsonl").write_text("".join(lines[:2]))
  run.run(config(), search, tmp_path / "b")
  again = run.read_results(tmp_path / "b")
  assert [*map(without_clock, again)] == [*map(without_clock, records)]
  assert not (tmp_path / "b" / "runs" / records[1]["id"]).exists()
  report.run([tmp_path / "b"], tmp_path / "b", 0.01)
  assert records[3]["arm"] in (tmp_path / "b" / "report.md").read_text()
  with pytest.raises(UserError, match="need one another"):
    run.run(config(), search, tmp_path / "b", shard=(0, 2))
