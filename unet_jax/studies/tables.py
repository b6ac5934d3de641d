"""The tables of a study's report, as HTML and as Markdown."""

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unet_jax.studies import analysis, charts, statistics

COVERS = ", ".join(
  f"{share:.0%} at {n} seeds"
  for n, share in statistics.BOOTSTRAP_COVERAGE.items()
)
# Of `evaluate.probe_skips`, and of train lines.
_CUTS = "zeroed", "averaged", "shuffled"
_PROBES = "skip_gradient_norm", "deep_gradient_norm", "skip_energy_share"
# Columns of a table, with the format of their numbers.
_NUMBERS = {"Dice": ".4f", "low": ".4f", "high": ".4f"}
_CHANGE = {"difference": "+.4f", "from": "+.4f", "to": "+.4f"}
_COUNTS = {"seeds": "d", "images": "d"}
_COST = {"parameters": "amount", "MACs": "amount", "seconds": ",.1f"}


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of texts and numbers; None and NaN are shown as a dash."""

  caption: str
  columns: Mapping[str, str]
  rows: Sequence[Sequence[Any]]

  def texts(self) -> list[list[str]]:
    return [
      [text_of(x, f) for x, f in zip(row, self.columns.values(), strict=True)]
      for row in self.rows
    ]

  def html(self) -> str:
    """With a button in each header that sorts."""
    kinds = [
      ' class="number"' if form else "" for form in self.columns.values()
    ]
    heads = "".join(
      f'<th scope="col"{kind}><button type="button">{html.escape(name)}'
      "</button></th>"
      for name, kind in zip(self.columns, kinds, strict=True)
    )
    lines = []
    for row, texts in zip(self.rows, self.texts(), strict=True):
      # Names may be cut after a comma.
      name = html.escape(texts[0]).replace(",", ",<wbr>")
      line = f'<th scope="row">{name}</th>'
      for value, text, kind in zip(row[1:], texts[1:], kinds[1:], strict=True):
        kind = ' class="long"' if len(text) > 40 else kind
        if kind and value == value and isinstance(value, (int, float)):
          kind += f' data-value="{value!r}"'
        line += f"<td{kind}>{html.escape(text)}</td>"
      lines.append(f"<tr>{line}</tr>")
    caption = html.escape(self.caption)
    return (
      f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">'
      f"<table><caption><span>{caption}</span></caption>"
      f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
      "</table></div>"
    )

  def markdown(self) -> str:
    rows = [list(self.columns), ["---"] * len(self.columns)]
    rows += [[plain(text) for text in row] for row in self.texts()]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def arm_table(study: analysis.Study) -> Table:
  """The score of each arm, and what it cost."""
  columns = {"arm": "", "no.": "d", **_NUMBERS, **_drawn(study, ".4f")}
  columns |= {"SD of seeds": ".4f", **_COUNTS, "Dice, pooled": ".4f", **_COST}
  rows = []
  for number, arm in enumerate(study.arms, 1):
    e, first = arm.estimate, arm.runs[0]
    cost = first["params"], first["macs"], mean_of(arm.runs, "seconds")
    drawn = arm.bootstrap[0] if study.bootstrap else ()
    pooled = mean_of([r.get("metrics", {}) for r in arm.runs], "dice")
    rows.append([arm.name, number, *ends_of(e), *drawn, e.sd_seeds])
    rows[-1] += [e.num_seeds, e.num_images, pooled, *cost]
  caption = "Dice, mean over seeds and images, with its 95 % interval"
  if study.bootstrap:
    caption += f"; the bootstrap covers {COVERS}"
  return Table(caption, columns, rows)


def baseline_name(study: analysis.Study) -> str:
  """The baseline, in a sentence."""
  names = sorted(set(study.baselines.values()))
  return names[0] if len(names) == 1 else ("its group's" if names else "none")


def _drawn(study: analysis.Study, form: str) -> dict[str, str]:
  """Columns of the bootstrap."""
  names = ("bootstrap from", "bootstrap to") if study.bootstrap else ()
  return dict.fromkeys(names, form)


def difference_table(study: analysis.Study) -> Table:
  """Each arm less its baseline."""
  columns = {"arm": "", **_CHANGE, **_drawn(study, "+.4f"), **_COUNTS}
  columns |= {"p": ".2g", "p (Holm)": ".2g"}
  rows = []
  for arm in study.arms:
    if d := arm.difference:
      e = d.estimate
      drawn = arm.bootstrap[1] if study.bootstrap else ()
      rows.append([arm.name, *ends_of(e), *drawn, e.num_seeds, e.num_images])
      rows[-1] += [d.p, d.p_holm, d.verdict]
  caption = f"Dice less that of {baseline_name(study)}, same seeds and images"
  return Table(caption, {**columns, "verdict": ""}, rows)


def group_tables(study: analysis.Study) -> list[Table]:
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
      own = analysis.compare(by_arm, study.baselines, study.margin, key, images)
      for name, e in own[0].items():
        d = own[1][name].estimate if name in own[1] else analysis.NONE
        found.append([name, group, e.num_images, *ends_of(e), *ends_of(d)])
    columns = {"arm": "", what: "", "images": "d", **_NUMBERS, **_CHANGE}
    if found:
      tables.append(Table(f"Dice by {what}; no correction", columns, found))
  by_object = _object_table(study)
  return [*tables, by_object] if by_object.rows else tables


def _object_table(study: analysis.Study) -> Table:
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
    scores: dict[str, analysis.Scores] = {arm: {} for arm in runs}
    for arm, r in ((arm, r) for arm, own in runs.items() for r in own):
      for row in r["per_image"]:
        both = row.get("object_pixels", ()), row.get("object_found", ())
        pairs = zip(*both, strict=True)
        shares = [share for n, share in pairs if low < n <= high]
        if shares:
          own = scores[arm].setdefault(r["seed"], {})
          own[row["name"]] = float(np.mean(shares))
    own, differences = analysis.judge(scores, study.baselines, study.margin)
    for arm, e in own.items():
      d = differences[arm].estimate if arm in differences else analysis.NONE
      rows.append([arm, size, e.num_images, *ends_of(e), *ends_of(d)])
  columns = {"arm": "", "object": "", "images": "d", "found": ".4f"}
  columns |= {"low": ".4f", "high": ".4f", **_CHANGE}
  caption = "Share of an object that is found, by its size; no correction"
  return Table(caption, columns, rows)


def _thirds(a: float, b: float) -> tuple[tuple[str, float, float], ...]:
  """Names and ends of three sizes."""
  return (
    (f"small, up to {a:.0f} pixels", -1, a),
    ("medium", a, b),
    (f"large, above {b:.0f} pixels", b, math.inf),
  )


def shifted_table(study: analysis.Study) -> Table:
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
  estimates, differences = analysis.compare(
    by_arm, study.baselines, study.margin
  )
  rows = []
  for arm in (arm for arm in study.arms if arm.name in by_arm):
    e, d = estimates[arm.name], differences.get(arm.name)
    rows.append([arm.name, e.num_seeds, e.num_images, arm.estimate.mean])
    rows[-1] += [*ends_of(e), *ends_of(d.estimate if d else analysis.NONE)]
    rows[-1] += [d and d.p_holm, d and d.verdict]
  columns = {"arm": "", **_COUNTS, f"on {study.split}": ".4f", **_NUMBERS}
  columns |= {**_CHANGE, "p (Holm)": ".2g", "verdict": ""}
  caption = f"Dice on the shifted split, less that of {baseline_name(study)}"
  return Table(caption, columns, rows)


def probe_tables(study: analysis.Study) -> list[Table]:
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
      scores = analysis.scores_of(by_arm, f"dice_{name}_{level}", less="dice")
      for arm, own in scores.items():
        (array,) = analysis.shared_by(own)
        e = statistics.summarize(array) if array.size else analysis.NONE
        found.setdefault(arm, []).append(e)
    for arm, es in found.items():
      if es[0].num_seeds:
        ends = [x for e in es for x in ends_of(e)]
        cuts.append([arm, level, es[0].num_seeds, es[0].num_images, *ends])
  for arm, runs in by_arm.items():
    lines = [line for r in runs for line in r.get("probes") or ()]
    steps = sorted({line["step"] for line in lines})
    for step in dict.fromkeys(steps[:1] + steps[-1:]):
      here = [line for line in lines if line["step"] == step]
      for level in range(len(here[0]["skip_gradient_norm"])):
        means = [
          mean_of([{k: line[k][level]} for line in here], k) for k in _PROBES
        ]
        ratio = means[0] / means[1] if all(means[:2]) else None
        learned.append([arm, level, step, len(here), *means, ratio])
  cuts.sort(key=lambda row: list(by_arm).index(row[0]))
  columns = {"arm": "", "level": "d", **_COUNTS}
  for name in _CUTS:
    columns |= {name: "+.4f", f"{name}: from": "+.4f", f"{name}: to": "+.4f"}
  tables = [Table("Change of Dice with a level's skips cut", columns, cuts)]
  columns = {"arm": "", "level": "d", "step": "d", "seeds": "d"}
  columns |= {k.replace("_", " "): ".3g" for k in _PROBES}
  columns |= {"skip / deep": ".3g"}
  caption = "Gradients and energies at the joins while training"
  tables.append(Table(caption, columns, learned))
  return [table for table in tables if table.rows]


def run_table(study: analysis.Study) -> Table:
  """Every record."""
  columns = {"id": "", "arm": "", "seed": "d", "status": "", "reason": ""}
  columns |= {"overrides": "", "config_hash": "", "step": "d", "git": ""}
  columns |= {"device": "", "seconds": ",.1f", "memory_bytes": "amount"}
  rows = []
  for r in study.records:
    changes = [f"{k}={v}" for k, v in r.get("overrides", {}).items()]
    shown = {**r, "overrides": "; ".join(changes) or "none"}
    rows.append([shown.get(name) for name in columns])
  return Table("What each run was", columns, rows)


def ends_of(estimate: statistics.Estimate) -> charts.Interval:
  """Mean and ends of the interval."""
  return estimate.mean, estimate.low, estimate.high


def mean_of(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
  """The mean of a key, over the rows that have it."""
  values = [row[key] for row in rows if row.get(key) is not None]
  return float(np.mean(values)) if values else None


def text_of(value: Any, form: str) -> str:
  """A cell; `form` is a format of numbers, "amount", or "" for what it is."""
  if value is None or value != value:
    return "\N{EN DASH}"
  if not form:
    return str(value).replace("+-", "±")
  text = charts.amount(value) if form == "amount" else format(value, form)
  return text.replace("-", "\N{MINUS SIGN}")


def plain(text: str) -> str:
  """A name that means nothing in Markdown."""
  text = " ".join(text.split())
  return "".join("\\" + c if c in "\\|`*<>[]" else c for c in text)
