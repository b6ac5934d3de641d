"""The report of a study: what its results.jsonl says, and how surely.

The score is the Dice of an image; images without one (no foreground) are left
out. Everything the page needs is inside it: it opens without a network.
"""

import base64
import csv
import dataclasses
import html
import io
import math
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unet_jax.errors import UserError
from unet_jax.inspect import pictures
from unet_jax.runtime import writers
from unet_jax.studies import charts, statistics

Scores = dict[int, dict[str, float]]  # By seed and image.
_Ends = tuple[float, float]

_NO_ENDS = math.nan, math.nan
_NONE = statistics.Estimate(*[math.nan] * 5, 0, 0)
# What a verdict leaves open.
_MEANING = {
  statistics.UNCLEAR: "No evidence of a difference is no evidence that there is"
  " none: the truth may be anywhere in the interval.",
  statistics.UNKNOWN: "What one seed shows is no claim: another may turn it"
  " round.",
}
# Of `evaluate.probe_skips`, and of train lines.
_CUTS = "zeroed", "averaged", "shuffled"
_PROBES = "skip_gradient_norm", "deep_gradient_norm", "skip_energy_share"
_SIDES = "low", "high"
_COVERS = ", ".join(
  f"{share:.0%} at {n} seeds"
  for n, share in statistics.BOOTSTRAP_COVERAGE.items()
)
# Columns of a table, with the format of their numbers.
_NUMBERS = {"Dice": ".4f", "low": ".4f", "high": ".4f"}
_CHANGE = {"difference": "+.4f", "from": "+.4f", "to": "+.4f"}
_COUNTS = {"seeds": "d", "images": "d"}
_COST = {"parameters": "amount", "MACs": "amount", "seconds": ",.1f"}


@dataclasses.dataclass(frozen=True)
class _Arm:
  """What is known of an arm."""

  name: str
  runs: Sequence[Mapping[str, Any]]  # The records that are done, by seed.
  estimate: statistics.Estimate  # Of the score; NaN without images.
  # To the baseline; None for itself, or where nothing is shared.
  difference: statistics.Difference | None
  # Ends by `statistics.bootstrap` of score and difference; NaN without.
  bootstrap: tuple[_Ends, _Ends]


@dataclasses.dataclass(frozen=True)
class _Study:
  """All records, and the arms that have a finished run, baselines first.

  `baselines` has the arm that each arm is compared with, its group's, itself
  perhaps; an arm whose group has no finished baseline is not in it.
  """

  records: Sequence[Mapping[str, Any]]
  arms: Sequence[_Arm]
  baselines: Mapping[str, str]
  margin: float
  split: str
  bootstrap: bool


@dataclasses.dataclass(frozen=True)
class _Table:
  """Rows of texts and numbers; None and NaN are shown as a dash."""

  caption: str
  columns: Mapping[str, str]
  rows: Sequence[Sequence[Any]]

  def texts(self) -> list[list[str]]:
    return [
      [_text(x, f) for x, f in zip(row, self.columns.values(), strict=True)]
      for row in self.rows
    ]

  def html(self) -> str:
    """With a button in each header that sorts."""
    kinds = [
      ' class="number"' if form else "" for form in self.columns.values()
    ]
    heads = "".join(
      f'<th scope="col"{kind}><button type="button">{_escape(name)}'
      "</button></th>"
      for name, kind in zip(self.columns, kinds, strict=True)
    )
    lines = []
    for row, texts in zip(self.rows, self.texts(), strict=True):
      # Names may be cut after a comma.
      name = _escape(texts[0]).replace(",", ",<wbr>")
      line = f'<th scope="row">{name}</th>'
      for value, text, kind in zip(row[1:], texts[1:], kinds[1:], strict=True):
        kind = ' class="long"' if len(text) > 40 else kind
        if kind and value == value and isinstance(value, (int, float)):
          kind += f' data-value="{value!r}"'
        line += f"<td{kind}>{_escape(text)}</td>"
      lines.append(f"<tr>{line}</tr>")
    caption = _escape(self.caption)
    return (
      f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">'
      f"<table><caption><span>{caption}</span></caption>"
      f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
      "</table></div>"
    )

  def markdown(self) -> str:
    rows = [list(self.columns), ["---"] * len(self.columns)]
    rows += [[_plain(text) for text in row] for row in self.texts()]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def run(
  workdirs: Sequence[pathlib.Path],
  output: pathlib.Path,
  margin: float,
  bootstrap: bool = False,
) -> None:
  """`--mode report`: writes report.html, report.md and report.csv.

  Args:
    workdirs: folders of studies, shown as one.
    output: folder of the report.
    margin: differences of the score within +- this do not matter.
    bootstrap: also show the intervals of `statistics.bootstrap`.

  Raises:
    UserError: results are missing or broken, or do not belong together.
  """
  study = _analyse(_read(workdirs), margin, bootstrap)
  for name, text in (
    ("report.csv", _csv(study)),
    ("report.md", _markdown(study)),
    ("report.html", _page(study)),
  ):
    writers.write_atomically(output / name, text.encode())
  writers.log(f"done: {output / 'report.html'}")


def _read(workdirs: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
  """The records of all folders; of equal ids the last counts."""
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


def _analyse(
  records: list[dict[str, Any]], margin: float, bootstrap: bool
) -> _Study:
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
  estimates, differences = _compare(by_arm, baselines, margin)
  drawn = _bootstrap(by_arm, baselines) if bootstrap else {}
  arms = [
    _Arm(
      *(name, runs, estimates[name], differences.get(name)),
      drawn.get(name, (_NO_ENDS, _NO_ENDS)),
    )
    for name, runs in by_arm.items()
  ]
  split = done[0]["split"]
  return _Study(records, arms, baselines, margin, split, bootstrap)


def _compare(
  by_arm: Mapping[str, Sequence[Mapping[str, Any]]],
  baselines: Mapping[str, str],
  margin: float,
  key: str = "dice",
  images: frozenset[str] | None = None,
) -> tuple[dict[str, statistics.Estimate], dict[str, statistics.Difference]]:
  """Scores `key` of each arm, and those less the baseline's."""
  return _judge(_scores(by_arm, key, images), baselines, margin)


def _judge(
  scores: Mapping[str, Scores], baselines: Mapping[str, str], margin: float
) -> tuple[dict[str, statistics.Estimate], dict[str, statistics.Difference]]:
  """`_compare` of scores that are made."""
  estimates = {}
  for name, own in scores.items():
    (array,) = _shared(own)
    estimates[name] = statistics.summarize(array) if array.size else _NONE
  return estimates, statistics.judge(_paired(scores, baselines), margin)


def _bootstrap(
  by_arm: Mapping[str, Sequence[Mapping[str, Any]]],
  baselines: Mapping[str, str],
) -> dict[str, tuple[_Ends, _Ends]]:
  """Of each arm with several seeds, the ends of score and difference."""
  scores = _scores(by_arm, "dice")
  paired, found = _paired(scores, baselines), {}
  for name, own in scores.items():
    arrays = _shared(own)[0], paired.get(name, np.empty((0, 0)))
    found[name] = tuple(
      statistics.bootstrap(x) if len(x) > 1 and x.size else _NO_ENDS
      for x in arrays
    )
  return found


def _scores(
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
    name: _shared(own, scores[baselines[name]])
    for name, own in scores.items()
    if baselines.get(name, name) != name and baselines[name] in scores
  }
  return {name: a - b for name, (a, b) in pairs.items() if a.size}


def _shared(*arms: Scores) -> list[np.ndarray]:
  """Arrays [seeds, images] of what all arms have."""
  seeds = sorted(set.intersection(*(set(arm) for arm in arms)))
  rows = [set(arm[seed]) for arm in arms for seed in seeds]
  names = sorted(set.intersection(*rows)) if rows else []
  return [np.array([[arm[s][n] for n in names] for s in seeds]) for arm in arms]


# --- What is said ------------------------------------------------------------


def _claims(study: _Study) -> list[str]:
  """One sentence an arm."""
  said = []
  for arm in study.arms:
    if d := arm.difference:
      by = charts.interval_text(_ends(d.estimate), signed=True)
      if math.isfinite(d.p):
        by += f", p = {_text(d.p_holm, '.2g')}"
      said.append(f"{arm.name}: {_text(d.verdict, '')}, {by}.")
    elif study.baselines.get(arm.name, arm.name) != arm.name:
      nothing = "nothing can be said; it shares no finished seed or no image"
      said.append(f"{arm.name}: {nothing} with the baseline.")
  verdicts = {arm.difference.verdict for arm in study.arms if arm.difference}
  said += [text for verdict, text in _MEANING.items() if verdict in verdicts]
  return said or ["There is nothing to compare with a baseline."]


def _caveats(study: _Study) -> list[str]:
  """How sure the page can be."""
  counts = {arm.name: len(arm.runs) for arm in study.arms}
  fewest, said = min(counts.values()), []
  if max(counts.values()) == 1:
    said.append(
      "Every arm has one seed: this page can say nothing about seeds. It gives"
      " no interval and no p; any difference may be the luck of one start."
    )
  elif fewest == 1:
    names = ", ".join(name for name, n in counts.items() if n == 1)
    said.append(f"One seed only, so nothing about seeds can be said: {names}.")
  else:
    said.append(
      f"Every arm has at least {fewest} seeds. Intervals (95 %) are for another"
      " seed and another image of the same kind"
      + ("; with so few seeds they are wide." if fewest < 5 else ".")
    )
  if study.split == "val":
    said.append(
      "There was no test split: scores are of val, which was watched during"
      " training. They may flatter, and are no test."
    )
  else:
    said.append(f"Scores are of the {study.split} split, after training.")
  images = {
    row["name"] for arm in study.arms for row in arm.runs[0]["per_image"]
  }
  scored = max(arm.estimate.num_images for arm in study.arms)
  said.append(f"{scored} of {len(images)} images have a Dice in all seeds.")
  if scored < len(images):
    said[-1] += (
      " In the others truth and a prediction have no foreground; so false"
      " alarms there do not count."
    )
  if any(a.estimate.low < 0 or a.estimate.high > 1 for a in study.arms):
    said.append(
      "Some intervals reach beyond 0 to 1, where no Dice can be: so few and"
      " so different runs hardly say anything."
    )
  said += _about_tests(study)
  failed = [r["id"] for r in study.records if r["status"] != "done"]
  if failed:
    said.append(f"Without a result, and left out: {', '.join(failed)}.")
  if alone := [a.name for a in study.arms if a.name not in study.baselines]:
    said.append(
      "No run of a baseline is done, so there are no differences of"
      f" {', '.join(alone)}."
    )
  for key, what in (("git", "revisions of the code"), ("device", "devices")):
    kinds = sorted({str(r.get(key)) for a in study.arms for r in a.runs})
    if len(kinds) > 1:
      said.append(f"The runs are of several {what}: {', '.join(kinds)}.")
  return said


def _about_tests(study: _Study) -> list[str]:
  """How p and intervals came about, and what they cannot tell."""
  said = []
  tested = [arm.difference for arm in study.arms if arm.difference]
  number = sum(math.isfinite(d.p) for d in tested)
  if number:
    said.append(
      f"p is corrected for {number} comparisons (Holm); intervals are of one"
      f" comparison each. Differences within ±{study.margin:g} are held not to"
      " matter."
    )
    few = min(d.estimate.num_seeds for d in tested if math.isfinite(d.p))
    if (least := statistics.smallest_sign_flip_p(few)) > 1 - statistics.LEVEL:
      said.append(
        f"A test that flips the signs of the differences of {few} seeds cannot"
        f" go below p = {least:g}, so none is made; p here rests on the model."
      )
  if study.bootstrap:
    said.append(
      "The bootstrap (percentile, seeds and images drawn anew) is nominally of"
      f" 95 %; measured, it covers {_COVERS}. Trust the other interval."
    )
  if any(r.get("budget") == "seconds" for r in study.records):
    said.append(
      "Every arm was given as many steps as the baseline's time allows by the"
      " speeds in budget.json; another or a busier machine would give others."
    )
  return said


def _arm_table(study: _Study) -> _Table:
  columns = {"arm": "", "no.": "d", **_NUMBERS, **_drawn(study, ".4f")}
  columns |= {"SD of seeds": ".4f", **_COUNTS, "Dice, pooled": ".4f", **_COST}
  rows = []
  for number, arm in enumerate(study.arms, 1):
    e, first = arm.estimate, arm.runs[0]
    cost = first["params"], first["macs"], _mean(arm.runs, "seconds")
    drawn = arm.bootstrap[0] if study.bootstrap else ()
    pooled = _mean([r.get("metrics", {}) for r in arm.runs], "dice")
    rows.append([arm.name, number, *_ends(e), *drawn, e.sd_seeds])
    rows[-1] += [e.num_seeds, e.num_images, pooled, *cost]
  caption = "Dice, mean over seeds and images, with its 95 % interval"
  if study.bootstrap:
    caption += f"; the bootstrap covers {_COVERS}"
  return _Table(caption, columns, rows)


def _named(study: _Study) -> str:
  """The baseline, in a sentence."""
  names = sorted(set(study.baselines.values()))
  return names[0] if len(names) == 1 else ("its group's" if names else "none")


def _drawn(study: _Study, form: str) -> dict[str, str]:
  """Columns of the bootstrap."""
  names = ("bootstrap from", "bootstrap to") if study.bootstrap else ()
  return dict.fromkeys(names, form)


def _difference_table(study: _Study) -> _Table:
  columns = {"arm": "", **_CHANGE, **_drawn(study, "+.4f"), **_COUNTS}
  columns |= {"p": ".2g", "p (Holm)": ".2g"}
  rows = []
  for arm in study.arms:
    if d := arm.difference:
      e = d.estimate
      drawn = arm.bootstrap[1] if study.bootstrap else ()
      rows.append([arm.name, *_ends(e), *drawn, e.num_seeds, e.num_images])
      rows[-1] += [d.p, d.p_holm, d.verdict]
  caption = f"Dice less that of {_named(study)}, same seeds and images"
  return _Table(caption, {**columns, "verdict": ""}, rows)


def _group_tables(study: _Study) -> list[_Table]:
  """By class, and by how much foreground an image has."""
  by_arm = {arm.name: arm.runs for arm in study.arms}
  rows = [row for arm in study.arms for r in arm.runs for row in r["per_image"]]
  keys = sorted({k for row in rows for k in row if k.startswith("dice_class_")})
  classes = {key[5:].replace("_", " "): (key, None) for key in keys}
  pixels = {
    r["name"]: r["foreground_pixels"] for r in rows if "foreground_pixels" in r
  }
  sizes = {}
  if pixels:
    a, b = np.quantile(list(pixels.values()), (1 / 3, 2 / 3))
    for name, low, high in _thirds(a, b):
      images = frozenset(k for k, n in pixels.items() if low < n <= high)
      if images:
        sizes[name] = ("dice", images)
  tables = []
  for what, groups in (("class", classes), ("foreground in the image", sizes)):
    found = []
    for group, (key, images) in groups.items():
      own = _compare(by_arm, study.baselines, study.margin, key, images)
      for name, e in own[0].items():
        d = own[1][name].estimate if name in own[1] else _NONE
        found.append([name, group, e.num_images, *_ends(e), *_ends(d)])
    columns = {"arm": "", what: "", "images": "d", **_NUMBERS, **_CHANGE}
    if found:
      tables.append(_Table(f"Dice by {what}; no correction", columns, found))
  by_object = _object_table(study)
  return [*tables, by_object] if by_object.rows else tables


def _object_table(study: _Study) -> _Table:
  """How much of the objects is found, by their size."""
  runs = {arm.name: arm.runs for arm in study.arms}
  sizes = [
    n
    for own in runs.values()
    for r in own
    for row in r["per_image"]
    for n in row.get("object_pixels", ())
  ]
  rows = []
  a, b = np.quantile(sizes, (1 / 3, 2 / 3)) if sizes else (0, 0)
  for size, low, high in _thirds(a, b) if sizes else ():
    scores: dict[str, Scores] = {arm: {} for arm in runs}
    for arm, r in ((arm, r) for arm, own in runs.items() for r in own):
      for row in r["per_image"]:
        both = row.get("object_pixels", ()), row.get("object_found", ())
        pairs = zip(*both, strict=True)
        shares = [share for n, share in pairs if low < n <= high]
        if shares:
          own = scores[arm].setdefault(r["seed"], {})
          own[row["name"]] = float(np.mean(shares))
    own, differences = _judge(scores, study.baselines, study.margin)
    for arm, e in own.items():
      d = differences[arm].estimate if arm in differences else _NONE
      rows.append([arm, size, e.num_images, *_ends(e), *_ends(d)])
  columns = {"arm": "", "object": "", "images": "d", "found": ".4f"}
  columns |= {"low": ".4f", "high": ".4f", **_CHANGE}
  caption = "Share of an object that is found, by its size; no correction"
  return _Table(caption, columns, rows)


def _thirds(a: float, b: float) -> tuple[tuple[str, float, float], ...]:
  """Names and ends of three sizes."""
  return (
    (f"small, up to {a:.0f} pixels", -1, a),
    ("medium", a, b),
    (f"large, above {b:.0f} pixels", b, math.inf),
  )


def _shifted_table(study: _Study) -> _Table:
  """The same networks on the split "shifted", which they never saw."""
  by_arm = {
    arm.name: [
      {**r, "per_image": r["shifted"]["per_image"]}
      for r in arm.runs
      if r.get("shifted")
    ]
    for arm in study.arms
  }
  by_arm = {name: runs for name, runs in by_arm.items() if runs}
  estimates, differences = _compare(by_arm, study.baselines, study.margin)
  rows = []
  for arm in (arm for arm in study.arms if arm.name in by_arm):
    e, d = estimates[arm.name], differences.get(arm.name)
    rows.append([arm.name, e.num_seeds, e.num_images, arm.estimate.mean])
    rows[-1] += [*_ends(e), *_ends(d.estimate if d else _NONE)]
    rows[-1] += [d and d.p_holm, d and d.verdict]
  columns = {"arm": "", **_COUNTS, f"on {study.split}": ".4f", **_NUMBERS}
  columns |= {**_CHANGE, "p (Holm)": ".2g", "verdict": ""}
  caption = f"Dice on the shifted split, less that of {_named(study)}"
  return _Table(caption, columns, rows)


def _probe_tables(study: _Study) -> list[_Table]:
  """What the skips carry: cut after training, and measured during it."""
  by_arm = {arm.name: arm.runs for arm in study.arms}
  rows = [
    row for runs in by_arm.values() for r in runs for row in r["per_image"]
  ]
  keys = {k for row in rows for k in row if k.startswith("dice_zeroed_")}
  cuts, learned = [], []
  for level in sorted(int(k.rsplit("_", 1)[1]) for k in keys):
    found = {}
    for name in _CUTS:
      scores = _scores(by_arm, f"dice_{name}_{level}", less="dice")
      for arm, own in scores.items():
        (array,) = _shared(own)
        e = statistics.summarize(array) if array.size else _NONE
        found.setdefault(arm, []).append(e)
    for arm, es in found.items():
      if es[0].num_seeds:
        ends = [x for e in es for x in _ends(e)]
        cuts.append([arm, level, es[0].num_seeds, es[0].num_images, *ends])
  for arm, runs in by_arm.items():
    lines = [line for r in runs for line in r.get("probes") or ()]
    steps = sorted({line["step"] for line in lines})
    for step in dict.fromkeys(steps[:1] + steps[-1:]):
      here = [line for line in lines if line["step"] == step]
      for level in range(len(here[0]["skip_gradient_norm"])):
        means = [
          _mean([{k: line[k][level]} for line in here], k) for k in _PROBES
        ]
        ratio = means[0] / means[1] if all(means[:2]) else None
        learned.append([arm, level, step, len(here), *means, ratio])
  cuts.sort(key=lambda row: list(by_arm).index(row[0]))
  columns = {"arm": "", "level": "d", **_COUNTS}
  for name in _CUTS:
    columns |= {name: "+.4f", f"{name}: from": "+.4f", f"{name}: to": "+.4f"}
  tables = [_Table("Change of Dice with a level's skips cut", columns, cuts)]
  columns = {"arm": "", "level": "d", "step": "d", "seeds": "d"}
  columns |= {k.replace("_", " "): ".3g" for k in _PROBES}
  columns |= {"skip / deep": ".3g"}
  caption = "Gradients and energies at the joins while training"
  tables.append(_Table(caption, columns, learned))
  return [table for table in tables if table.rows]


def _run_table(study: _Study) -> _Table:
  columns = {"id": "", "arm": "", "seed": "d", "status": "", "reason": ""}
  columns |= {"overrides": "", "config_hash": "", "step": "d", "git": ""}
  columns |= {"device": "", "seconds": ",.1f", "memory_bytes": "amount"}
  rows = []
  for r in study.records:
    changes = [f"{k}={v}" for k, v in r.get("overrides", {}).items()]
    shown = {**r, "overrides": "; ".join(changes) or "none"}
    rows.append([shown.get(name) for name in columns])
  return _Table("What each run was", columns, rows)


# --- The three files ---------------------------------------------------------


def _csv(study: _Study) -> str:
  """A row an arm, numbers in full."""
  rows = []
  for arm in study.arms:
    d, first = arm.difference, arm.runs[0]
    own = [r for r in study.records if r["arm"] == arm.name]
    change = dataclasses.asdict(d.estimate if d else _NONE)
    rows.append(
      {
        "arm": arm.name,
        "baseline": int(arm.name == study.baselines.get(arm.name)),
        "split": study.split,
        **{f"dice_{k}": x for k, x in dataclasses.asdict(arm.estimate).items()},
        **{f"difference_{k}": x if d else None for k, x in change.items()},
        **_drawn_csv(study, arm),
        "p": d and d.p,
        "p_holm": d and d.p_holm,
        "verdict": d and d.verdict,
        "margin": study.margin,
        "dice_pooled": _mean([r.get("metrics", {}) for r in arm.runs], "dice"),
        "params": first["params"],
        "macs": first["macs"],
        "seconds": _mean(arm.runs, "seconds"),
        "runs_without_result": len(own) - len(arm.runs),
      }
    )
  text = io.StringIO()
  table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
  table.writeheader()
  for row in rows:
    table.writerow(
      {k: "" if x is None or x != x else x for k, x in row.items()}
    )
  return text.getvalue()


def _drawn_csv(study: _Study, arm: _Arm) -> dict[str, float]:
  names = [f"{x}_bootstrap_{e}" for x in ("dice", "difference") for e in _SIDES]
  ends = [x for pair in arm.bootstrap for x in pair]
  return dict(zip(names, ends, strict=True)) if study.bootstrap else {}


def _markdown(study: _Study) -> str:
  parts = ["# Report of a study", "## What can be said"]
  parts.append("\n".join(f"- {_plain(x)}" for x in _claims(study)))
  parts.append("## How sure this is")
  parts.append("\n".join(f"- {_plain(x)}" for x in _caveats(study)))
  tables = [_arm_table(study), _difference_table(study), *_group_tables(study)]
  tables += [_shifted_table(study), *_probe_tables(study), _run_table(study)]
  for table in tables:
    parts += [f"## {table.caption}", table.markdown()] if table.rows else []
  return "\n\n".join(parts) + "\n"


def _page(study: _Study) -> str:
  template = pathlib.Path(__file__).with_name("report.html").read_text()
  differences = [
    (
      arm.name,
      _ends(arm.difference.estimate),
      _text(arm.difference.verdict, ""),
    )
    for arm in study.arms
    if arm.difference
  ]
  costs = ""
  for key, what in (("macs", "multiply-accumulates"), ("params", "parameters")):
    points = [(a.name, a.runs[0][key], _ends(a.estimate)) for a in study.arms]
    costs += charts.cost(points, set(study.baselines.values()), what)
  shifted = any(r.get("shifted") for a in study.arms for r in a.runs)
  title = "Difference of Dice to the baseline"
  forest = charts.forest(differences, study.margin, title)
  parts = {
    "lead": _escape(
      f"{len(study.records)} runs of {len(study.arms)} arms; baseline:"
      f" {_named(study)}; split: {study.split}."
    ),
    "claims": _items(_claims(study)),
    "caveats": _items(_caveats(study)),
    "arms": _arm_table(study).html(),
    "differences": _difference_table(study).html() if differences else "",
    "forest": forest if differences else "",
    "costs": costs,
    "curves": _curve_part(study),
    "shifted": _shifted_table(study).html() if shifted else "",
    "groups": "".join(t.html() for t in _group_tables(study)),
    "probes": "".join(t.html() for t in _probe_tables(study)),
    "pictures": _picture_part(study),
    "runs": _run_table(study).html(),
  }
  nothing = "<p>The results hold nothing for this.</p>"
  hidden = {  # What few studies ask for is not shown empty.
    f"no_{name}": "" if parts[name] else " hidden"
    for name in ("shifted", "probes")
  }
  parts = {name: part or nothing for name, part in parts.items()} | hidden
  return string.Template(template).substitute(parts)


def _curve_part(study: _Study) -> str:
  """A chart an arm, all with the same axes, and the numbers."""
  curves: dict[str, dict[int, list[float]]] = {}  # By arm and step, of seeds.
  for arm in study.arms:
    points = [point for r in arm.runs for point in r.get("curve", ())]
    for step, value in sorted(points, key=lambda point: point[0]):
      if value is not None:
        curves.setdefault(arm.name, {}).setdefault(step, []).append(value)
  if not curves:
    return ""
  values = [v for steps in curves.values() for vs in steps.values() for v in vs]
  steps = sorted({step for own in curves.values() for step in own})
  axes = (
    pictures.ticks(np.array(steps, float)),
    pictures.ticks(np.array(values)),
  )
  drawn = []
  for name, own in curves.items():
    dashed = curves.get(study.baselines.get(name, ""), {})
    drawn.append(charts.curve(name, own, dashed, axes))
  rows = [
    [name, step, len(v), float(np.mean(v)), min(v), max(v)]
    for name, own in curves.items()
    for step, v in own.items()
  ]
  columns = {"arm": "", "step": "d", "seeds": "d", "Dice": ".4f"}
  columns |= {"lowest seed": ".4f", "highest seed": ".4f"}
  table = _Table("Learning curves", columns, rows).html()
  return (
    f'<div class="charts">{"".join(drawn)}</div>'
    f"<details><summary>The numbers</summary>{table}</details>"
  )


def _picture_part(study: _Study) -> str:
  """The same difficult images in all arms, of one seed."""
  found: dict[int, dict[str, list[dict[str, Any]]]] = {}
  for arm in study.arms:
    for r in arm.runs:
      path = r["folder"] / "runs" / r["id"] / "difficult.npz"
      if path.exists():
        scores = {row["name"]: row.get("dice") for row in r["per_image"]}
        found.setdefault(r["seed"], {})[arm.name] = _load(path, scores)
  if not found:
    return ""
  seed, by_arm = next(iter(found.items()))
  all_rows = [row for rows in by_arm.values() for row in rows]
  highest = [
    max(row[k].max() for k in ("label", "prediction")) for row in all_rows
  ]
  parts = []
  for name in dict.fromkeys(row["name"] for row in all_rows):
    groups = []
    for arm, rows in by_arm.items():
      for row in (row for row in rows if row["name"] == name):
        cells, note = pictures.cells(row, max(2, int(max(highest)) + 1))
        kinds = ["input", "truth", "prediction", "error"][: len(cells)]
        shown = [_figure(*x, name) for x in zip(cells[:2], kinds, strict=False)]
        if not groups and len(cells) > 1:
          groups.append("".join(shown))
        score = _text(row["dice"], ".3f")
        kinds = [f"{arm}: prediction, Dice {score}", f"{arm}: error"]
        own = zip(cells[2:] or cells, kinds, strict=False)
        groups.append("".join(_figure(*x, name) for x in own))
    title = f"<h3>{_escape(' '.join([name, note]))}</h3>"
    pairs = "".join(f'<div class="pair">{group}</div>' for group in groups)
    parts.append(f'{title}<div class="pairs">{pairs}</div>')
  return f"<p>Seed {seed}.</p>{''.join(parts)}"


def _load(
  path: pathlib.Path, scores: Mapping[str, float | None]
) -> list[dict[str, Any]]:
  """Rows as `pictures.panel` takes them; the arrays end in a number each."""
  rows = []
  with np.load(path) as file:
    for k in range(sum(name.startswith("name_") for name in file.files)):
      names = ("image", "label", "weight", "prediction")
      row = {name: file[f"{name}_{k}"] for name in names}
      name = str(file[f"name_{k}"])
      rows.append({**row, "name": name, "dice": scores.get(name)})
  return rows


def _figure(image: Any, caption: str, name: str) -> str:
  buffer = io.BytesIO()
  image.save(buffer, "PNG", optimize=True)
  data = base64.b64encode(buffer.getvalue()).decode()
  return (
    f'<figure><img src="data:image/png;base64,{data}" width="{image.width}"'
    f' height="{image.height}" alt="{_escape(f"{name}, {caption}")}">'
    f"<figcaption>{_escape(caption)}</figcaption></figure>"
  )


def _items(texts: Sequence[str]) -> str:
  return f"<ul>{''.join(f'<li>{_escape(text)}</li>' for text in texts)}</ul>"


def _ends(estimate: statistics.Estimate) -> charts.Interval:
  return estimate.mean, estimate.low, estimate.high


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
  values = [row[key] for row in rows if row.get(key) is not None]
  return float(np.mean(values)) if values else None


def _text(value: Any, form: str) -> str:
  if value is None or value != value:
    return "\N{EN DASH}"
  if not form:
    return str(value).replace("+-", "±")
  text = charts.amount(value) if form == "amount" else format(value, form)
  return text.replace("-", "\N{MINUS SIGN}")


def _escape(text: str) -> str:
  return html.escape(text)


def _plain(text: str) -> str:
  """A name that means nothing in Markdown."""
  text = " ".join(text.split())
  return "".join("\\" + c if c in "\\|`*<>[]" else c for c in text)
