"""The report of a study: what its results.jsonl says, and how surely.

Everything the page needs is inside it: it opens without a network.
"""

import base64
import csv
import dataclasses
import html
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unet_jax.inspect import pages, pictures
from unet_jax.runtime import writers
from unet_jax.studies import analysis, charts, statistics, tables

# What a verdict leaves open.
_MEANING = {
  statistics.UNCLEAR: "No evidence of a difference is no evidence that there is"
  " none: the truth may be anywhere in the interval.",
  statistics.UNKNOWN: "What one seed shows is no claim: another may turn it"
  " round.",
}
_SIDES = "low", "high"


def run(
  workdirs: Sequence[pathlib.Path],
  output: pathlib.Path,
  margin: float,
  bootstrap: bool = False,
  num_pictures: int | None = None,
) -> None:
  """`--mode report`: writes report.html, report.md and report.csv.

  Args:
    workdirs: folders of studies, shown as one.
    output: folder of the report.
    margin: differences of the score within +- this do not matter.
    bootstrap: also show the intervals of `statistics.bootstrap`.
    num_pictures: difficult images of each arm; None = all that were kept.

  Raises:
    UserError: results are missing or broken, or do not belong together.
  """
  study = analysis.analyse(analysis.read(workdirs), margin, bootstrap)
  for name, text in (
    ("report.csv", _csv(study)),
    ("report.md", _markdown(study)),
    ("report.html", _page(study, num_pictures)),
  ):
    writers.write_atomically(output / name, text.encode())
  writers.log(f"done: {output / 'report.html'}")


# --- What is said ------------------------------------------------------------


def _claims(study: analysis.Study) -> list[str]:
  """One sentence an arm."""
  said = []
  for arm in study.arms:
    if d := arm.difference:
      by = charts.interval_text(tables.ends_of(d.estimate), signed=True)
      if math.isfinite(d.p):
        by += f", p = {tables.text_of(d.p_holm, '.2g')}"
      said.append(f"{arm.name}: {tables.text_of(d.verdict, '')}, {by}.")
    elif study.baselines.get(arm.name, arm.name) != arm.name:
      nothing = "nothing can be said; it shares no finished seed or no image"
      said.append(f"{arm.name}: {nothing} with the baseline.")
  verdicts = {arm.difference.verdict for arm in study.arms if arm.difference}
  said += [text for verdict, text in _MEANING.items() if verdict in verdicts]
  return said or ["There is nothing to compare with a baseline."]


def _caveats(study: analysis.Study) -> list[str]:
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


def _about_tests(study: analysis.Study) -> list[str]:
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
      f" 95 %; measured, it covers {tables.COVERS}. Trust the other interval."
    )
  if any(r.get("budget") == "seconds" for r in study.records):
    said.append(
      "Every arm was given as many steps as the baseline's time allows by the"
      " speeds in budget.json; another or a busier machine would give others."
    )
  return said


# --- The three files ---------------------------------------------------------


def _csv(study: analysis.Study) -> str:
  """A row an arm, numbers in full."""
  rows = []
  for arm in study.arms:
    d, first = arm.difference, arm.runs[0]
    own = [r for r in study.records if r["arm"] == arm.name]
    change = dataclasses.asdict(d.estimate if d else analysis.NONE)
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
        "dice_pooled": tables.mean_of(
          [r.get("metrics", {}) for r in arm.runs], "dice"
        ),
        "params": first["params"],
        "macs": first["macs"],
        "seconds": tables.mean_of(arm.runs, "seconds"),
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


def _drawn_csv(study: analysis.Study, arm: analysis.Arm) -> dict[str, float]:
  names = [f"{x}_bootstrap_{e}" for x in ("dice", "difference") for e in _SIDES]
  ends = [x for pair in arm.bootstrap for x in pair]
  return dict(zip(names, ends, strict=True)) if study.bootstrap else {}


def _markdown(study: analysis.Study) -> str:
  parts = ["# Report of a study", "## What can be said"]
  parts.append("\n".join(f"- {tables.plain(x)}" for x in _claims(study)))
  parts.append("## How sure this is")
  parts.append("\n".join(f"- {tables.plain(x)}" for x in _caveats(study)))
  shown = [tables.arm_table(study), tables.difference_table(study)]
  shown += [*tables.group_tables(study), tables.shifted_table(study)]
  shown += [*tables.probe_tables(study), tables.run_table(study)]
  for table in shown:
    parts += [f"## {table.caption}", table.markdown()] if table.rows else []
  return "\n\n".join(parts) + "\n"


def _page(study: analysis.Study, num_pictures: int | None) -> str:
  differences = [
    (
      arm.name,
      tables.ends_of(arm.difference.estimate),
      tables.text_of(arm.difference.verdict, ""),
    )
    for arm in study.arms
    if arm.difference
  ]
  costs = ""
  for key, what in (("macs", "multiply-accumulates"), ("params", "parameters")):
    points = [
      (a.name, a.runs[0][key], tables.ends_of(a.estimate)) for a in study.arms
    ]
    costs += charts.cost(points, set(study.baselines.values()), what)
  shifted = any(r.get("shifted") for a in study.arms for r in a.runs)
  title = "Difference of Dice to the baseline"
  forest = charts.forest(differences, study.margin, title)
  parts = {
    "lead": html.escape(
      f"{len(study.records)} runs of {len(study.arms)} arms; baseline:"
      f" {tables.baseline_name(study)}; split: {study.split}."
    ),
    "claims": _items(_claims(study)),
    "caveats": _items(_caveats(study)),
    "arms": tables.arm_table(study).html(),
    "differences": tables.difference_table(study).html() if differences else "",
    "forest": forest if differences else "",
    "costs": costs,
    "curves": _curve_part(study),
    "shifted": tables.shifted_table(study).html() if shifted else "",
    "groups": "".join(t.html() for t in tables.group_tables(study)),
    "probes": "".join(t.html() for t in tables.probe_tables(study)),
    "pictures": _picture_part(study, num_pictures),
    "runs": tables.run_table(study).html(),
  }
  nothing = "<p>The results hold nothing for this.</p>"
  hidden = {  # What few studies ask for is not shown empty.
    f"no_{name}": "" if parts[name] else " hidden"
    for name in ("shifted", "probes")
  }
  parts = {name: part or nothing for name, part in parts.items()} | hidden
  return pages.fill(pathlib.Path(__file__).with_name("report.html"), parts)


def _curve_part(study: analysis.Study) -> str:
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
  table = tables.Table("Learning curves", columns, rows).html()
  return (
    f'<div class="charts">{"".join(drawn)}</div>'
    f"<details><summary>The numbers</summary>{table}</details>"
  )


def _picture_part(study: analysis.Study, number: int | None) -> str:
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
  for name in [*dict.fromkeys(row["name"] for row in all_rows)][:number]:
    groups = []
    for arm, rows in by_arm.items():
      for row in (row for row in rows if row["name"] == name):
        cells, note = pictures.cells(row, max(2, int(max(highest)) + 1))
        kinds = ["input", "truth", "prediction", "error"][: len(cells)]
        shown = [_figure(*x, name) for x in zip(cells[:2], kinds, strict=False)]
        if not groups and len(cells) > 1:
          groups.append("".join(shown))
        score = tables.text_of(row["dice"], ".3f")
        kinds = [f"{arm}: prediction, Dice {score}", f"{arm}: error"]
        own = zip(cells[2:] or cells, kinds, strict=False)
        groups.append("".join(_figure(*x, name) for x in own))
    title = f"<h3>{html.escape(' '.join([name, note]))}</h3>"
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
  image.save(buffer, "WEBP", lossless=True)  # Half of a PNG.
  data = base64.b64encode(buffer.getvalue()).decode()
  return (
    f'<figure><img src="data:image/webp;base64,{data}" width="{image.width}"'
    f' height="{image.height}" alt="{html.escape(f"{name}, {caption}")}">'
    f"<figcaption>{html.escape(caption)}</figcaption></figure>"
  )


def _items(texts: Sequence[str]) -> str:
  return (
    f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</ul>"
  )
