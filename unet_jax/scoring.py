"""Extra scores of each image, on the host: `eval.extra_metrics`.

Each image is scored once, whole, at its own size, by the host that fed it; the
hosts then share their numbers, so that how many there are is not in the result.
Pixels of weight 0 count nowhere and belong to no object.

A data set's score is the mean over the images where it is defined (not NaN),
as in the Data Science Bowl 2018 (ap) and the ISBI 2012 challenge: images weigh
alike, however many objects they hold. `NAME_undefined` counts the others, for
each name in `eval.extra_metrics`. Only calibration adds up the pixels of all
images, since bins of few pixels are noise.

True objects are those of the source (`instances/`), else they are made from the
label in the way that predicted ones are from pixels (`eval.instances_from`), a
label being certain of itself.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from unet_jax.config import Config
from unet_jax.data.source import Source
from unet_jax.objectives import (
  calibration,
  instances,
  partition,
  surface,
  topology,
)
from unet_jax.runtime import parallel, writers
from unet_jax.schema import EXTRA_METRICS

_Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Image:
  """What is scored, at the image's own size.

  Attributes:
    label, prediction: class ids, int [*S].
    counted: bool [*S].
    probability: float32 [*S, L], or None if nothing asks for it.
    truth, objects: ids of true and predicted objects, int32 [*S], or None.
    classes: ids of the classes that objects have.
    spacing: size of a pixel along each axis.
  """

  label: np.ndarray
  prediction: np.ndarray
  counted: np.ndarray
  probability: np.ndarray | None
  truth: np.ndarray | None
  objects: np.ndarray | None
  classes: Sequence[int]
  spacing: Sequence[float]

  def mask(self, label: np.ndarray) -> np.ndarray:
    """Where a label map has an object."""
    return np.isin(label, self.classes)


def _surface(image: _Image, cfg: Config) -> _Row:
  """By class, and the mean over `eval.foreground`."""
  classes = cfg.eval.foreground or range(1, cfg.num_labels)
  scores = np.full((3, cfg.num_labels), np.nan)
  for k in classes:
    scores[:, k] = surface.surface_scores(
      image.label == k,
      image.prediction == k,
      image.counted,
      spacing=image.spacing,
      tolerance=cfg.eval.surface_tolerance,
    )
  names = ("hd95", "asd", "nsd")
  row = {name: _mean(s) for name, s in zip(names, scores, strict=True)}
  per_class = zip(names, scores.tolist(), strict=True)
  return row | {f"{name}_per_class": values for name, values in per_class}


def _rand(image: _Image, cfg: Config) -> _Row:
  del cfg
  scores = partition.rand_scores(image.truth, image.objects)
  names = ("rand_error", "rand_precision", "rand_recall")
  return dict(zip(names, scores, strict=True))


def _vi(image: _Image, cfg: Config) -> _Row:
  del cfg
  scores = partition.information_scores(image.truth, image.objects)
  return dict(zip(("vi", "vi_split", "vi_merge"), scores, strict=True))


def _isbi(image: _Image, cfg: Config) -> _Row:
  """At the prediction, and at each threshold of the objects' probability."""
  del cfg
  score = lambda mask: partition.isbi_scores(image.truth, mask, image.counted)
  rand, info = score(image.mask(image.prediction))
  likely = image.probability[..., list(image.classes)].sum(-1)
  by_threshold = [score(likely > t)[0] for t in partition.THRESHOLDS]
  return {
    "isbi_rand": rand,
    "isbi_info": info,
    "isbi_rand_by_threshold": by_threshold,
  }


def _warping(image: _Image, cfg: Config) -> _Row:
  del cfg
  masks = image.mask(image.label), image.mask(image.prediction)
  return {"warping_error": topology.warping_error(*masks, image.counted)}


def _instances(image: _Image, cfg: Config) -> _Row:
  del cfg
  return instances.match_scores(image.truth, image.objects)


def _calibration(image: _Image, cfg: Config) -> _Row:
  del cfg
  bins = calibration.bin_confidence(
    image.probability, image.label, image.counted
  )
  return {"ece": calibration.expected_error(bins), "bins": bins.tolist()}


# The choices of eval.extra_metrics.
EXTRAS: dict[str, Callable[[_Image, Config], _Row]] = {
  "surface": _surface,
  "rand": _rand,
  "vi": _vi,
  "isbi": _isbi,
  "warping": _warping,
  "instances": _instances,
  "calibration": _calibration,
}


def needs_probability(cfg: Config) -> bool:
  """Whether a score asks for more than the predicted classes."""
  asked = {"isbi", "calibration"} & set(cfg.eval.extra_metrics)
  return bool(asked) or (_needs_objects(cfg) and _by_watershed(cfg))


def _needs_objects(cfg: Config) -> bool:
  asked = {"rand", "vi", "isbi", "instances"}
  return bool(asked & set(cfg.eval.extra_metrics))


def _by_watershed(cfg: Config) -> bool:
  return cfg.eval.instances_from == "watershed"


class ExtraScores:
  """Collects the extra scores of a source's images; see the module."""

  def __init__(self, cfg: Config, source: Source):
    self._cfg, self._source = cfg, source
    self._rows: dict[int, _Row] = {}
    self._seconds = collections.defaultdict(float)

  def add(
    self,
    index: int,
    label: np.ndarray,
    weight: np.ndarray,
    prediction: np.ndarray,
    probability: np.ndarray | None,
  ) -> None:
    """Scores an image: arrays [*S, ...] of at least its size."""
    size = self._source.size(index)
    cut = tuple(slice(0, n) for n in size)
    image = _Image(
      label=label[cut],
      prediction=prediction[cut],
      counted=weight[cut] > 0,
      probability=None if probability is None else probability[cut],
      truth=None,
      objects=None,
      classes=self._classes(),
      spacing=self._spacing(index, len(size)),
    )
    if _needs_objects(self._cfg):
      start = time.perf_counter()
      image = self._with_objects(index, image)
      self._seconds["objects"] += time.perf_counter() - start
    row = self._rows[index] = {}
    for name in self._cfg.eval.extra_metrics:
      start = time.perf_counter()
      row.update(EXTRAS[name](image, self._cfg))
      self._seconds[name] += time.perf_counter() - start

  def _spacing(self, index: int, dims: int) -> Sequence[float]:
    """What the config says, else the data, else 1."""
    given, ones = self._cfg.eval.spacing, (1.0,) * dims
    if given or "surface" not in self._cfg.eval.extra_metrics:
      return given or ones
    return self._source.spacing(index) or ones

  def _classes(self) -> list[int]:
    """Of the objects; all but background and boundary unless named."""
    scores = self._cfg.eval
    others = {0, scores.boundary_class}
    every = [k for k in range(self._cfg.num_labels) if k not in others]
    return list(scores.instance_classes) or every

  def _with_objects(self, index: int, image: _Image) -> _Image:
    truth = self._source.instances(index)
    if truth is None:
      labels = np.arange(self._cfg.num_labels)
      certain = (image.label[..., None] == labels).astype(np.float32)
      truth = self._find_objects(image.label, certain, image)
    objects = self._find_objects(image.prediction, image.probability, image)
    return dataclasses.replace(
      image, truth=np.where(image.counted, truth, 0), objects=objects
    )

  def _find_objects(
    self, label: np.ndarray, probability: np.ndarray | None, image: _Image
  ) -> np.ndarray:
    label = np.where(image.counted, label, -1)
    if not _by_watershed(self._cfg):
      return instances.from_components(label, image.classes)
    return instances.from_watershed(
      label,
      probability,
      image.classes,
      boundary=self._cfg.eval.boundary_class,
      threshold=self._cfg.eval.seed_probability,
    )

  def finish(self) -> tuple[_Row, list[_Row], np.ndarray | None]:
    """Shares the scores with the other hosts; says what they cost.

    Returns:
      the scores of the data set, those of each image in the order of the
      source, and the bins of `calibration.bin_confidence`, or None.
    """
    if not self._cfg.eval.extra_metrics:
      return {}, [{} for _ in range(len(self._source))], None
    self._tell_cost()
    gathered = parallel.from_all(list(self._rows.items()))
    found = dict(pair for pairs in gathered for pair in pairs)
    rows = [found[i] for i in range(len(self._source))]
    bins = None
    if "bins" in rows[0]:
      bins = np.sum([row.pop("bins") for row in rows], axis=0)
    summary = summarize(rows, self._cfg.eval.extra_metrics)
    if bins is not None:
      summary["ece"] = calibration.expected_error(bins)
    return summary, [_flat(row) for row in rows], bins

  def _tell_cost(self) -> None:
    parts = [f"{name} {s:.2f}" for name, s in self._seconds.items()]
    total = sum(self._seconds.values())
    writers.log(
      f"extra metrics of {len(self._rows)} images, seconds: {', '.join(parts)};"
      f" {total:.2f} in all"
    )


def summarize(rows: Sequence[Mapping[str, Any]], groups: Sequence[str]) -> _Row:
  """The mean of each score over the rows where it is not NaN.

  Lists are averaged entry by entry. `isbi_rand_max` is that of the threshold
  that is best for all images together, as in the challenge.
  """
  summary = {name: _mean([row[name] for row in rows]) for name in rows[0]}
  if "isbi_rand_by_threshold" in summary:
    best = max(summary["isbi_rand_by_threshold"], key=lambda x: (x == x, x))
    summary["isbi_rand_max"] = best
  for group in groups:
    first = EXTRA_METRICS[group][0]
    undefined = sum(math.isnan(row[first]) for row in rows)
    summary[f"{group}_undefined"] = undefined
  return summary


def _flat(row: Mapping[str, Any]) -> _Row:
  """A row of a table: lists by class become columns, others are left out."""
  flat = {k: v for k, v in row.items() if not isinstance(v, list)}
  for name, values in row.items():
    stem = name.removesuffix("_per_class")
    if stem != name:
      flat |= {f"{stem}_class_{k}": v for k, v in enumerate(values)}
  return flat


def _mean(values: Any) -> Any:
  """Mean over the first axis of what is not NaN; NaN where nothing is left."""
  values = np.asarray(values, np.float64)
  present = ~np.isnan(values)
  count = present.sum(0)
  total = np.where(present, values, 0.0).sum(0)
  mean = np.full(total.shape, np.nan)
  return np.divide(total, count, out=mean, where=count > 0).tolist()
