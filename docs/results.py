"""Writes docs/RESULTS.md from finished runs; it reads and starts nothing.

python docs/results.py RUNS [--output docs/RESULTS.md]

RUNS as `benchmarks/results.py` fills it. A set is on the page once all three of
its seeds are done; what is not is named.
"""

import argparse
import dataclasses
import json
import pathlib
import runpy
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from unet_jax.studies import run as studies
from unet_jax.studies import statistics
from unet_jax.studies.statistics import Estimate

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCHER = runpy.run_path(str(ROOT / "benchmarks" / "results.py"))
NUM_SEEDS = 3
_LESS = " (less is better)"


@dataclasses.dataclass(frozen=True)
class Score:
  """What the page shows of a set.

  Attributes:
    title: its name.
    row: the key in the scores of an image; "" = it is pooled.
    pooled: the key in the scores of a split; "" = it is a mean over images.
    unit: what is pooled.
  """

  title: str
  row: str = ""
  pooled: str = ""
  unit: str = "pixels"


@dataclasses.dataclass(frozen=True)
class Shown:
  """A set of the page: its title, what its images are, its scores."""

  title: str
  item: str
  scores: tuple[Score, ...]


SHOWN = {
  "synthetic": Shown(
    "Synthetic cells", "images", (Score("Dice", "dice", "dice"),)
  ),
  "dsb2018": Shown(
    "DSB2018 nuclei",
    "images",
    (
      Score("Dice", "dice", "dice"),
      Score("IoU", "iou", "iou"),
      Score("AP50 of objects", "ap50"),
    ),
  ),
  "isbi2012": Shown(
    "ISBI 2012 membranes",
    "slices",
    (
      Score("membrane IoU", "iou", "iou"),
      Score(f"adapted Rand error{_LESS}", "rand_error"),
      Score(f"variation of information, bits{_LESS}", "vi"),
    ),
  ),
  "hippocampus3d": Shown(
    "Hippocampus, 3D",
    "volumes",
    (Score("mean Dice of two classes", "dice", "dice", "voxels"),),
  ),
  "ewt_upos": Shown(
    "EWT parts of speech",
    "sentences",
    (Score("accuracy", pooled="accuracy", unit="tokens"),),
  ),
}


@dataclasses.dataclass(frozen=True)
class Finished:
  """What is done of a set: records by seed, ours and the peer's."""

  name: str
  ours: list[dict[str, Any]]
  peer: list[dict[str, Any]]
  environment: dict[str, Any]

  @property
  def shown(self) -> Shown:
    return SHOWN[self.name]


def read(runs: pathlib.Path, name: str) -> Finished | None:
  """A set whose seeds are all done, or None; the peer likewise, or []."""
  study = runs / name
  ours = [r for r in studies.read_results(study) if r["status"] == "done"]
  ours.sort(key=lambda r: r["seed"])
  if len(ours) < NUM_SEEDS:
    return None
  paths = [study / "peer" / f"{r['id']}.json" for r in ours]
  done = [json.loads(p.read_text()) for p in paths if p.exists()]
  environment = json.loads((study / "env.json").read_text())
  return Finished(
    name, ours, done if len(done) == len(ours) else [], environment
  )


# --- Scores -------------------------------------------------------------------


def matrix(records: Sequence[dict], key: str, *, pooled: bool) -> np.ndarray:
  """float64 [seeds, images] of a score; pooled [seeds, 1]."""
  if pooled:
    rows = [[r["metrics"][key]] for r in records]
  else:
    rows = [[image[key] for image in r["per_image"]] for r in records]
  return np.array(rows, np.float64)  # None, for NaN, is NaN.


def estimates(
  finished: Finished, key: str, *, pooled: bool
) -> tuple[list[Estimate | None], int]:
  """Ours, the peer's, and the difference; and how many images they rest on."""
  ours = matrix(finished.ours, key, pooled=pooled)
  both = [ours]
  if finished.peer:
    both.append(matrix(finished.peer, key, pooled=pooled))
  defined = np.isfinite(np.concatenate(both)).all(0)
  both = [scores[:, defined] for scores in both]
  if finished.peer:
    both.append(both[0] - both[1])
  found = [statistics.summarize(scores) for scores in both]
  return [*found, *[None] * (3 - len(found))], int(defined.sum())


def score_rows(finished: Finished) -> Iterator[list[str]]:
  """Cells: set, score, ours, the peer's, the difference."""
  shown, records = finished.shown, finished.ours
  total = len(records[0]["per_image"])
  where = f"{shown.title}, {records[0]['split']} ({total} {shown.item})"
  for score in shown.scores:
    for key, pooled in ((score.row, False), (score.pooled, True)):
      if not key:
        continue
      found, count = estimates(finished, key, pooled=pooled)
      how = f"mean over {shown.item}"
      if pooled:
        how = f"pooled over {score.unit}"
      elif count < total:
        how += f", the {count} where it is defined"
      ours, peer, gap = (interval(e) for e in found)
      gap = gap if gap == "not run" or gap[0] == "-" else f"+{gap}"
      yield [where, f"{score.title}, {how}", f"**{ours}**", peer, gap]
      where = ""


def interval(estimate: Estimate | None) -> str:
  """`0.912 [0.905, 0.919]`."""
  if estimate is None:
    return "not run"
  e = estimate
  return f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]"


def seed_rows(finished: Finished) -> Iterator[list[str]]:
  """Cells: set, score, each seed of ours, each of the peer's."""
  where = finished.shown.title
  for score in finished.shown.scores:
    pooled = bool(score.pooled)
    cells = [
      " ".join(f"{x:.3f}" for x in np.nanmean(scores, 1))
      for records in (finished.ours, finished.peer)
      for scores in [matrix(records, score.pooled or score.row, pooled=pooled)]
      if records
    ]
    how = f"pooled over {score.unit}" if pooled else "mean"
    yield [
      where,
      f"{score.title}, {how}",
      *cells,
      *["not run"][len(cells) - 1 :],
    ]
    where = ""


# --- Cost ---------------------------------------------------------------------


def cost_rows(finished: Finished) -> Iterator[list[str]]:
  """Cells: set, network, parameters, steps, minutes of both clocks, machine."""
  env, where = finished.environment, finished.shown.title
  devices = (
    "" if env["devices"] == ["cpu"] else f", {', '.join(env['devices'])}"
  )
  machine = f"{env['processor']}, {env['cpu_count']} cores{devices}"
  for who, records in (("ours", finished.ours), ("PyTorch", finished.peer)):
    if not records:
      continue
    threads = records[0].get("threads")
    steps = [r["curve"][-1][0] if who == "ours" else r["step"] for r in records]
    yield [
      where,
      who,
      f"{records[0]['params']:,}",
      " ".join(map(str, steps if len(set(steps)) > 1 else steps[:1])),
      minutes(records, "wall_seconds"),
      minutes(records, "cpu_seconds"),
      machine + (f", {threads} thread(s)" if threads else ""),
    ]
    where = ""


def minutes(records: Sequence[dict], key: str) -> str:
  """Of each seed."""
  return " ".join(f"{r[key] / 60:.1f}" for r in records)


# --- The page -----------------------------------------------------------------


def table(head: Sequence[str], rows: Iterator[list[str]]) -> str:
  """In Markdown."""
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(sets: Sequence[Finished], missing: Sequence[str]) -> str:
  """RESULTS.md."""

  def rows(make: Any) -> Iterator[list[str]]:
    return (row for finished in sets for row in make(finished))

  own = [s.environment["versions"] for s in sets]
  versions = {f"{k} {v[k]}" for v in own for k in ("jax", "unet_jax")}
  versions |= {f"torch {r['torch']}" for s in sets for r in s.peer}
  clocks = {r["clock"] for s in sets for r in s.peer}
  parts = [
    _HEAD,
    table(("set", "score", "ours", "PyTorch", "difference"), rows(score_rows)),
    _INTERVALS,
    "## What they cost",
    textwrap.fill(
      _COST.format(
        versions=", ".join(sorted(versions)),
        clock=_CLOCKS["cpu" if "cpu" in clocks else "wall"],
      ),
      79,
    ),
    table(
      ("set", "network", "parameters", "steps", "minutes", "CPU minutes", "on"),
      rows(cost_rows),
    ),
    _SEEDS,
    table(("set", "score", "ours", "PyTorch"), rows(seed_rows)),
    _PEER,
    _COMMANDS.format(commands=_commands(sets, clocks)),
  ]
  if missing:
    names = "; ".join(SHOWN[name].title for name in missing)
    parts.append(
      textwrap.fill(f"Not run, and therefore not on this page: {names}.", 79)
    )
  return "\n\n".join(parts) + "\n"


def _commands(sets: Sequence[Finished], clocks: set[str]) -> str:
  lines = []
  for finished in sets:
    name = finished.name
    commands = [LAUNCHER["our_command"](name, "DATA", "RUNS")]
    if finished.peer:
      clock = finished.peer[0]["clock"]
      commands.append(LAUNCHER["peer_command"](name, "RUNS", clock))
    lines += [" ".join(["python", *command]) for command in commands]
  return "\n".join(lines)


_HEAD = """# Results

Made by `python docs/results.py RUNS` from finished runs, seeds 0, 1 and 2 of
each set, none chosen. The ready configs as they stand, beside the small
PyTorch U-Net that this project grew from, trained for as long. Nothing was
tuned on a test split. Without a test split the last checkpoint is scored on
val, since the best one was chosen there."""

_INTERVALS = """In brackets 95 % intervals. Of means over images: crossed
random effects of seeds and images, what another seed and another image would
give (`unet_jax/studies/statistics.py`); of what is pooled: Student's t over
the three seeds, what another seed would give on these images. Differences are
ours less PyTorch's, seed by seed and image by image; an interval that holds 0
is no evidence of one."""

_COST = """{versions}. Minutes of each seed from the first look at the data to
the last evaluation of training, compilation and saving with it; CPU minutes
are those of all threads. {clock}"""

_CLOCKS = {
  "wall": "PyTorch had our wall-clock on the same machine.",
  "cpu": "The machine was shared with other work, so that wall-clock says"
  " little about either: PyTorch had our CPU minutes; both clocks are given.",
}

_SEEDS = """## Every seed"""

_PEER = """## What is compared

PyTorch is the network this project grew from: widths 64, 128, 256 and 512,
bilinear upsampling with aligned corners, batch norm (of volumes the same in
3D). It has our splits, crops in our order, normalisation, losses, flips and
quarter turns, AdamW with our learning rates as a share of the time, and our
scores. It has not our other augmentation nor a moving average of weights; the
scoring of val while it trains, by our code, is not counted in its minutes, and
is in ours. Our configs were chosen on train and val; it got their learning
rate and no tuning of its own. Ours has the widths of the config, which are
smaller and so take more steps in the same time: this compares recipes, not
frameworks. Sentences have no peer: that network reads images, not words."""

_COMMANDS = """## Commands

```
{commands}
```

DATA holds the sets as README.md describes them, RUNS is new. All of it, going
on where it was stopped: `python benchmarks/results.py RUNS --data DATA`."""


def main() -> None:
  """Reads the arguments and writes the page."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("runs", type=pathlib.Path, metavar="RUNS")
  parser.add_argument("--output", type=pathlib.Path, default="docs/RESULTS.md")
  args = parser.parse_args()
  found = {name: read(args.runs, name) for name in SHOWN}
  for name, finished in found.items():
    peer = "" if finished and finished.peer else "; PyTorch: not run"
    print(f"{name}: {'done' if finished else 'not run'}{peer}")
  sets = [s for s in found.values() if s]
  if not sets:
    parser.exit(2, f"error: no set of {args.runs} is done; run more of it\n")
  args.output.write_text(page(sets, [n for n, s in found.items() if not s]))


if __name__ == "__main__":
  main()
