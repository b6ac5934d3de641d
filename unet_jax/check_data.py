"""`--mode check_data`: reads everything once and says what it is."""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.data import check, leaks, pipeline, proposal
from unet_jax.data.check import SPLITS, Facts, Survey
from unet_jax.data.folder import FolderSource
from unet_jax.errors import UserError
from unet_jax.inspect import data_report
from unet_jax.runtime import storage, writers

# A class with less of all pixels is rare; a Dice above is hardly a challenge.
_RARE, _EASY = 0.01, 0.8


def run(cfg: Config, workdir: pathlib.Path) -> None:
  """Writes data_report.json and data_report.html.

  Raises:
    UserError: training would fail; the report is written all the same.
  """
  if cfg.data.dir:
    root = storage.resolve(storage.to_path(cfg.data.dir))
    if storage.resolve(workdir) == root:
      raise UserError(f"--workdir {workdir} is the data folder; take another")
  found = check.survey(cfg, workdir_lib.split_dir(workdir))
  record = make_record(cfg, found)
  splits = propose_splits(found, listed=_is_folder(cfg))
  folder = workdir / "proposed_split"
  storage.remove_tree(folder)  # Of an earlier look.
  if splits:
    for split, stems in splits.items():
      text = "".join(f"{stem}\n" for stem in stems)
      writers.write_atomically(folder / f"{split}.txt", text.encode())
    record["leaks"]["proposed_split"] = str(folder)
  workdir_lib.write_json(workdir / "data_report.json", record)
  page, path = (
    data_report.page(record, found, cfg),
    workdir / "data_report.html",
  )
  writers.write_atomically(path, page.encode())
  for text in record["warnings"]:
    writers.log(f"warning: {text}")
  if record["problems"]:
    first, more = record["problems"][0]["message"], len(record["problems"]) - 1
    counted = f"; and {more} more problem{'s' * (more != 1)}" if more else ""
    raise UserError(f"{first}{counted}; see {path}")
  if record["proposal"]["line"]:
    writers.log(f"proposed: {record['proposal']['line']}")
  writers.log(f"done: {len(found.facts)} examples, nothing wrong; see {path}")


def make_record(cfg: Config, found: Survey) -> dict[str, Any]:
  """What data_report.json holds."""
  proposals = proposal.propose(cfg, found.facts)
  by_field = {p.field: p.value for p in proposals}
  warnings = [*_label_warnings(cfg, found), *_image_warnings(cfg, found)]
  return {
    "status": "training would fail" if found.problems else "ok",
    "source": cfg.data.source,
    "data": cfg.data.dir or cfg.data.name or cfg.data.source,
    "problems": [{"where": w, "message": m} for w, m in found.problems],
    "warnings": [*warnings, *_leak_warnings(cfg, found)],
    "splits": {s: _describe(found.of(s)) for s in found.sources},
    "labels": proposal.count_ids(found.facts),
    "class_weights": by_field.get("loss.class_weights"),
    "leaks": {
      "pairs": [_pair(p, found) for p in found.pairs],
      "crossing": sum(crosses(p, found) for p in found.pairs),
    },
    "trivial": {"split": found.scored, "scores": found.baselines},
    "proposal": {
      "line": proposal.to_flags(cfg, proposals),
      "fields": [
        {**p._asdict(), "now": proposal.current(cfg, p.field)}
        for p in proposals
      ],
    },
    "examples": [_example(f) for f in found.facts],
  }


def crosses(pair: leaks.Pair, found: Survey) -> bool:
  """Whether the two are in different splits."""
  return found.facts[pair.first].split != found.facts[pair.second].split


def propose_splits(found: Survey, listed: bool) -> dict[str, list[str]]:
  """Names by split so that no pair crosses; empty if none does.

  And if the source does not have its splits `listed` in files.

  Groups that do not cross stay. The others go, the largest first, to whichever
  of their splits lacks most of the size that it had.
  """
  if not listed or not any(crosses(p, found) for p in found.pairs):
    return {}
  facts, size = found.facts, Counter(f.split for f in found.facts)
  groups = leaks.group(len(facts), found.pairs)
  mixed = [g for g in groups if len({facts[i].split for i in g}) > 1]
  chosen = {i: facts[i].split for i in range(len(facts))}
  lacks = Counter({s: 0 for s in size})
  lacks.update(facts[i].split for g in mixed for i in g)
  for members in sorted(mixed, key=len, reverse=True):
    own = [s for s in SPLITS if any(facts[i].split == s for i in members)]
    best = max(own, key=lambda s: lacks[s])
    lacks[best] -= len(members)
    chosen |= {i: best for i in members}
  return {
    s: [f.name for i, f in enumerate(facts) if chosen[i] == s]
    for s in SPLITS
    if s in size
  }


# --- What is counted ----------------------------------------------------------


def _describe(facts: Sequence[Facts]) -> dict[str, Any]:
  images = [f for f in facts if f.size]
  sizes = Counter(" x ".join(map(str, f.size)) for f in images)
  spacings = Counter(str(f.spacing) for f in images if f.spacing)
  ids = proposal.count_ids(facts)
  total = sum(ids.values())
  return {
    "examples": len(facts),
    "usable": sum(not f.problems for f in facts),
    "sizes": dict(sizes.most_common()),
    "channels": dict(Counter(f.channels for f in images)),
    "spacing": dict(spacings.most_common()),
    "low": min((f.low for f in images), default=None),
    "high": max((f.high for f in images), default=None),
    "mean": float(np.mean([f.mean for f in images])) if images else None,
    "std": float(np.mean([f.std for f in images])) if images else None,
    "labels": {
      i: {
        "pixels": n,
        "share": n / total,
        "examples": sum(i in (f.ids or {}) for f in facts),
      }
      for i, n in ids.items()
    },
  }


def _example(facts: Facts) -> dict[str, Any]:
  """The facts but for arrays."""
  skipped = ("histogram", "fingerprint")
  names = [x.name for x in dataclasses.fields(facts) if x.name not in skipped]
  return {name: getattr(facts, name) for name in names}


def _pair(pair: leaks.Pair, found: Survey) -> dict[str, Any]:
  first, second = found.facts[pair.first], found.facts[pair.second]
  return {
    "kind": pair.kind,
    "first": f"{first.split}/{first.name}",
    "second": f"{second.split}/{second.name}",
    "correlation": pair.score,
    "crosses": crosses(pair, found),
  }


# --- What is said -------------------------------------------------------------


def _label_warnings(cfg: Config, found: Survey) -> list[str]:
  data, said = cfg.data, []
  values = data.mask_values or tuple(range(cfg.num_labels))
  for split in found.sources:
    ids = proposal.count_ids(found.of(split))
    total = sum(n for i, n in ids.items() if i in values)
    if absent := [str(i) for i in values if i not in ids]:
      said.append(f"{split}: no pixel of label {', '.join(absent)}")
    rare = [i for i in values if 0 < ids.get(i, 0) < _RARE * total]
    if rare and split == "train":
      names = ", ".join(f"{i} ({ids[i] / total:.2%})" for i in rare)
      said.append(f"{split}: few pixels of label {names}")
  if mixed := proposal.other_encoding(found.facts):
    said.append(
      f"{len(mixed)} masks hold 0 and 255 where others hold 0 and 1, and need"
      f" mending: {_names(mixed)}"
    )
  blank = [f for f in found.facts if f.ids and len(f.ids) == 1]
  if blank and cfg.model.dims > 1:
    named = _names(blank)
    said.append(f"{len(blank)} masks hold one label only: {named}")
  scores = {k: v["dice"] for k, v in found.baselines.items()}
  scores = {k: v for k, v in scores.items() if v > _EASY}  # No NaN.
  if scores:
    best = max(scores, key=scores.get)
    said.append(
      f"the {best} alone has a Dice of {scores[best]:.3f} on"
      f" {found.scored}, which a network has to beat: judge by other metrics"
      " too, or choose eval.foreground"
    )
  return said


def _image_warnings(cfg: Config, found: Survey) -> list[str]:
  images, said = [f for f in found.facts if f.size], []
  if flat := [f for f in images if f.low == f.high]:
    said.append(f"{len(flat)} images have one value only: {_names(flat)}")
  crop = cfg.data.crop_size
  small = [f for f in images if any(np.less(f.size, crop))]
  if small and cfg.data.source != "tokens":
    said.append(
      f"{len(small)} images are smaller than data.crop_size="
      f"{','.join(map(str, crop))} and are mirrored: {_names(small)}"
    )
  kinds = Counter(f.channels for f in images)
  if len(kinds) > 1:
    listed = ", ".join(f"{n} with {c}" for c, n in sorted(kinds.items()))
    said.append(
      f"images have different channels ({listed}); the network sees"
      f" {cfg.data.channels}"
    )
  spacings = {f.spacing for f in images if f.spacing}
  if len(spacings) > 1:
    said.append(f"voxels have {len(spacings)} sizes; the network sees voxels")
  listed = {name for source in found.sources.values() for name in source.names}
  if found.sources and _is_folder(cfg):
    others = sorted(set(FolderSource.list_stems(cfg)) - listed)
    if others:
      more = ", ..." * (len(others) > 5)
      said.append(
        f"{len(others)} images are in no split: {', '.join(others[:5])}{more}"
      )
  if "train" in found.sources and "test" not in found.sources:
    said.append("there is no test split; val, which is watched, is no test")
  return said


def _leak_warnings(cfg: Config, found: Survey) -> list[str]:
  said, what = [], cfg.data.examples
  counts = Counter((p.kind, crosses(p, found)) for p in found.pairs)
  for (kind, is_crossing), number in sorted(counts.items()):
    pairs = f"{number} pair{'s' * (number > 1)}"
    if is_crossing:
      said.append(
        f"{pairs} of {kind} {what} cross the splits: scores will flatter"
      )
    elif kind == "identical":
      said.append(f"{pairs} of identical {what} within a split")
  unlike = [
    found.facts[p.second]
    for p in found.pairs
    if p.kind == "identical"
    and found.facts[p.first].ids != found.facts[p.second].ids
  ]
  if unlike:
    said.append(f"identical {what} have different labels: {_names(unlike)}")
  if len(found.facts) > leaks.MOST_COMPARED and cfg.model.dims > 1:
    said.append(
      f"more than {leaks.MOST_COMPARED} images: only identical ones were"
      " looked for"
    )
  return said


def _is_folder(cfg: Config) -> bool:
  return pipeline.SOURCES[cfg.data.source] is FolderSource


def _names(facts: Sequence[Facts]) -> str:
  listed = ", ".join(f"{f.split}/{f.name}" for f in facts[:5])
  return listed + (", ..." if len(facts) > 5 else "")
