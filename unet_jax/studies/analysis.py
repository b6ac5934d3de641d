"""What the records of a study say: arms, estimates, differences.

The score is the Dice of an image; images without one (no foreground) are left
out.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unet_jax.errors import UserError
from unet_jax.runtime import writers
from unet_jax.studies import statistics

Scores = dict[int, dict[str, float]]  # By seed and image.
_Ends = tuple[float, float]

NONE = statistics.Estimate(*[math.nan] * 5, 0, 0)
_NO_ENDS = math.nan, math.nan


@dataclasses.dataclass(frozen=True)
class Arm:
  """What is known of an arm."""

  name: str
  runs: Sequence[Mapping[str, Any]]  # The records that are done, by seed.
  estimate: statistics.Estimate  # Of the score; NaN without images.
  # To the baseline; None for itself, or where nothing is shared.
  difference: statistics.Difference | None
  # Ends by `statistics.bootstrap` of score and difference; NaN without.
  bootstrap: tuple[_Ends, _Ends]


@dataclasses.dataclass(frozen=True)
class Study:
  """All records, and the arms that have a finished run, baselines first.

  `baselines` has the arm that each arm is compared with, its group's, itself
  perhaps; an arm whose group has no finished baseline is not in it.
  """

  records: Sequence[Mapping[str, Any]]
  arms: Sequence[Arm]
  baselines: Mapping[str, str]
  margin: float
  split: str
  bootstrap: bool


def read(workdirs: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
  """The records of all folders; of equal ids the last counts.

  Raises:
    UserError: a file is missing or broken, or the folders contradict.
  """
  found: dict[str, dict[str, Any]] = {}
  for workdir in workdirs:
    paths = sorted(workdir.glob("results*.jsonl"))
    if not paths:
      raise UserError(
        f"{workdir} has no results.jsonl; run --mode ablate there first"
      )
    for path in paths:
      for i, record in enumerate(writers.read_jsonl(path), 1):
        needed = {"id", "arm", "seed", "status"}
        if record.get("status") == "done":
          needed |= {"split", "per_image", "params", "macs"}
        if missing := sorted(needed - record.keys()):
          raise UserError(
            f"{path}, line {i}: no {missing[0]!r}; remove the line and run"
            " --mode ablate again"
          )
        old = found.get(record["id"])
        same = old and old.get("config_hash") == record.get("config_hash")
        if old and old["folder"] != workdir and not same:
          raise UserError(
            f"{path}, line {i}: {record['id']} has another config than in"
            f" {old['folder']}; report them one by one"
          )
        found[record["id"]] = {**record, "folder": workdir}
  return list(found.values())


def analyse(
  records: list[dict[str, Any]], margin: float, bootstrap: bool
) -> Study:
  """The records as a study; arguments as of `report.run`.

  Raises:
    UserError: no run is done, or the runs do not belong together.
  """
  done = [r for r in records if r["status"] == "done"]
  if not done:
    raise UserError("no run is done yet; run --mode ablate again")
  groups = {r["arm"]: r.get("group", "") for r in records}
  several = [
    {r["arm"] for r in records if r.get("baseline") and groups[r["arm"]] == g}
    for g in set(groups.values())
  ]
  for what, names in (
    *(("baselines", arms) for arms in several),
    ("splits", {r["split"] for r in done}),
  ):
    if len(names) > 1:
      raise UserError(
        f"the runs have several {what}, {', '.join(sorted(names))}; report"
        " their folders one by one"
      )
  marked = {groups[r["arm"]]: r["arm"] for r in done if r.get("baseline")}
  there = {r["arm"]: groups[r["arm"]] for r in done}
  order = list(dict.fromkeys(there.values()))
  names = sorted(
    there, key=lambda a: (order.index(there[a]), a != marked.get(there[a]))
  )
  baselines = {a: marked[there[a]] for a in names if there[a] in marked}
  by_arm = {
    name: sorted((r for r in done if r["arm"] == name), key=lambda r: r["seed"])
    for name in names
  }
  estimates, differences = compare(by_arm, baselines, margin)
  drawn = _bootstrap(by_arm, baselines) if bootstrap else {}
  arms = [
    Arm(
      *(name, runs, estimates[name], differences.get(name)),
      drawn.get(name, (_NO_ENDS, _NO_ENDS)),
    )
    for name, runs in by_arm.items()
  ]
  split = done[0]["split"]
  return Study(records, arms, baselines, margin, split, bootstrap)


def compare(
  by_arm: Mapping[str, Sequence[Mapping[str, Any]]],
  baselines: Mapping[str, str],
  margin: float,
  key: str = "dice",
  images: frozenset[str] | None = None,
) -> tuple[dict[str, statistics.Estimate], dict[str, statistics.Difference]]:
  """Scores `key` of each arm, and those less the baseline's."""
  return judge(scores_of(by_arm, key, images), baselines, margin)


def judge(
  scores: Mapping[str, Scores], baselines: Mapping[str, str], margin: float
) -> tuple[dict[str, statistics.Estimate], dict[str, statistics.Difference]]:
  """`compare` of scores that are made."""
  estimates = {}
  for name, own in scores.items():
    (array,) = shared_by(own)
    estimates[name] = statistics.summarize(array) if array.size else NONE
  return estimates, statistics.judge(_paired(scores, baselines), margin)


def _bootstrap(
  by_arm: Mapping[str, Sequence[Mapping[str, Any]]],
  baselines: Mapping[str, str],
) -> dict[str, tuple[_Ends, _Ends]]:
  """Of each arm with several seeds, the ends of score and difference."""
  scores = scores_of(by_arm, "dice")
  paired, found = _paired(scores, baselines), {}
  for name, own in scores.items():
    arrays = shared_by(own)[0], paired.get(name, np.empty((0, 0)))
    found[name] = tuple(
      statistics.bootstrap(x) if len(x) > 1 and x.size else _NO_ENDS
      for x in arrays
    )
  return found


def scores_of(
  by_arm: Mapping[str, Sequence[Mapping[str, Any]]],
  key: str,
  images: frozenset[str] | None = None,
  less: str | None = None,
) -> dict[str, Scores]:
  """Scores `key` of each arm, without those of `less`; of some images."""

  def of(row: Mapping[str, Any]) -> float | None:
    values = [row.get(name) for name in (key, less or key)]
    if None in values or (images and row["name"] not in images):
      return None
    return values[0] - values[1] if less else values[0]

  return {
    name: {
      r["seed"]: {
        row["name"]: of(row) for row in r["per_image"] if of(row) is not None
      }
      for r in runs
    }
    for name, runs in by_arm.items()
  }


def _paired(
  scores: Mapping[str, Scores], baselines: Mapping[str, str]
) -> dict[str, np.ndarray]:
  """Scores less the baseline's [seeds, images], where any are shared."""
  pairs = {
    name: shared_by(own, scores[baselines[name]])
    for name, own in scores.items()
    if baselines.get(name, name) != name and baselines[name] in scores
  }
  return {name: a - b for name, (a, b) in pairs.items() if a.size}


def shared_by(*arms: Scores) -> list[np.ndarray]:
  """Arrays [seeds, images] of what all arms have."""
  seeds = sorted(set.intersection(*(set(arm) for arm in arms)))
  rows = [set(arm[seed]) for arm in arms for seed in seeds]
  names = sorted(set.intersection(*rows)) if rows else []
  return [np.array([[arm[s][n] for n in names] for s in seeds]) for arm in arms]
