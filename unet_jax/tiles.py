"""Prediction in tiles: the whole image's result, in constant memory.

Every tile begins at a multiple of 2^depth of the padded image, so that its
poolings pair the same pixels, and its window lies so far inside that no pixel
of it sees the tile's own border: then it is what the whole image would give,
but for rounding. Tiles at the image's border end where it ends, with the same
mirrored pixels and the same zeros of same padding.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from unet_jax import geometry
from unet_jax.config import Config
from unet_jax.data import normalize, windows
from unet_jax.schema import ModelConfig

# float32 [B, *S, C] -> (mask uint8 [B, *S'], probabilities [N, B, *S', K]).
Apply = Callable[[np.ndarray], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Band:
  """Finished rows of a prediction.

  Attributes:
    mask: uint8 [n, *rest].
    samples: float32 [N, n, *rest, K], probabilities of each sample, averaged
      over the views.
  """

  mask: np.ndarray
  samples: np.ndarray


def why_inexact(model: ModelConfig) -> str | None:
  """What makes a value depend on the whole image; None = tiles are exact.

  Group and instance norm, gates and attention take means over all pixels;
  aligned corners depend on the size, and the noise of a control on the place.
  """
  reasons = {
    f"model.norm={model.norm!r}": model.norm in ("group", "instance"),
    "model.up='linear_aligned'": model.up == "linear_aligned",
    "model.bottleneck='transformer'": model.bottleneck == "transformer",
    "model.squeeze_excite": model.squeeze_excite,
    "model.classification_guided": model.classification_guided,
    f"model.skip={model.skip!r}": model.skip
    in ("se", "scse", "uctrans", "udtrans", "noise"),
  }
  return next((name for name, applies in reasons.items() if applies), None)


class Needs(NamedTuple):
  """What networks that see the same tiles need, all of them.

  Attributes:
    depths: the most poolings of each axis.
    rule: the padding that `geometry` speaks of.
    around: `geometry.reach` of each axis; None where no tile is exact.
  """

  depths: tuple[int, ...]
  rule: str
  around: tuple[tuple[int, int], ...] | None


def needs(models: Sequence[ModelConfig]) -> Needs:
  """Of one network, or of the members of an ensemble."""
  rules = {model.size_rule for model in models}
  # What is legal for "same" is so for "any".
  rule = "same" if len(rules) > 1 else min(rules)
  depths = tuple(map(max, zip(*(m.depths for m in models), strict=True)))
  if any(map(why_inexact, models)):
    return Needs(depths, rule, None)
  around = [
    tuple(map(max, zip(*(_reach(m, axis) for m in models), strict=True)))
    for axis in range(len(depths))
  ]
  return Needs(depths, rule, tuple(around))


def _reach(model: ModelConfig, axis: int) -> tuple[int, int]:
  gates = model.skip == "attn_oktay"  # On all levels but the finest.
  wide = [
    model.up == "linear" or (gates and level > 0)
    for level in range(model.depth)
  ]
  factors = geometry.pool_factors(model.pool_axes, model.dims, model.depth)
  return geometry.reach(
    *(model.depth, model.size_rule, wide, model.head_kernel),
    factors=[factor[axis] for factor in factors],
  )


@dataclasses.dataclass(frozen=True)
class Plan:
  """How an image is predicted.

  Attributes:
    axes: one for each spatial axis.
    batch: tiles in one batch.
    num_views: 1, or all.
  """

  axes: tuple[geometry.TileAxis, ...]
  batch: int
  num_views: int


def plan(cfg: Config, size: Sequence[int], need: Needs) -> Plan:
  """The plan for an image of `size`; one window an axis is the whole image."""
  tile = choose_tile(cfg, size, need)
  multiple, views = cfg.data.pad_multiple, cfg.predict.views
  pads = geometry.plan_pads(size, need.depths, need.rule, multiple)
  tiles = tile or [p.size for p in pads]
  axes = [
    geometry.plan_tiles(
      n,
      need.depths[axis],
      need.rule,
      tile=t,
      around=need.around and need.around[axis],
      multiple=multiple,
      views=views > 1,
    )
    for axis, (n, t) in enumerate(zip(size, tiles, strict=True))
  ]
  return Plan(tuple(axes), cfg.predict.tile_batch if tile else 1, views)


def is_cut(plan: Plan) -> bool:
  """Whether the image is in several tiles."""
  return any(len(axis.windows) > 1 for axis in plan.axes)


def choose_tile(
  cfg: Config, size: Sequence[int], need: Needs
) -> tuple[int, ...] | None:
  """The tile for an image, or None: it is predicted whole.

  Without `predict.tile` images of up to `predict.whole_pixels` are; beyond,
  tiles have about `eval.batch_pixels` pixels, and a third of each side at least
  is new.
  """
  if cfg.predict.tile:
    return cfg.predict.tile
  if math.prod(size) <= cfg.predict.whole_pixels:
    return None
  around = need.around or ((0, 0),) * cfg.model.dims
  side = round(cfg.eval.batch_pixels ** (1 / cfg.model.dims))
  views = cfg.predict.views > 1
  pads = geometry.plan_pads(size, need.depths, need.rule, cfg.data.pad_multiple)
  sides = [
    geometry.nearest_tile(
      max(side, 3 * sum(seen) // 2), depth, need.rule, seen, views
    )
    for depth, seen in zip(need.depths, around, strict=True)
  ]
  return tuple(min(n, pad.size) for n, pad in zip(sides, pads, strict=True))


def stream(
  picture: windows.Picture,
  plan: Plan,
  apply: Apply,
  normalization: dict[str, Any],
) -> Iterator[Band]:
  """Predicts an image and yields its rows from the first to the last.

  Args:
    picture: the image.
    plan: its tiles, and its views, whose probabilities are averaged.
    apply: the network.
    normalization: as of `normalize.normalize`; in mode "image" the image is
      gone through once before, and to be clipped it must be in one part.
  """
  axes = plan.axes
  normalization = normalize.of_image(normalization, windows.parts(picture))
  views = windows.all_views(len(axes), plan.num_views)
  seen = [(view, view.of(picture)) for view in views]
  rows, rest = axes[0].windows, [axis.windows for axis in axes[1:]]
  is_alone = plan.num_views == 1 and not _overlap(axes)
  old = None
  for i, row in enumerate(rows):
    jobs = [
      _Job(window, *own)
      for window in itertools.product([row], *rest)
      for own in seen
    ]
    band = _Sum(row, [axis.size for axis in axes[1:]], old)
    done = _run(jobs, axes, apply, normalization, plan.batch)
    for job, mask, samples in done:
      weight = _weight(job.window, axes)
      band.add(job.window, mask if is_alone else None, samples, weight)
    stop = rows[i + 1][0] if i + 1 < len(rows) else row[1]
    yield band.finish(stop)
    old = band


def whole(bands: Iterator[Band]) -> Band:
  """All rows of an image, in memory."""
  bands = list(bands)
  if len(bands) == 1:
    return bands[0]
  return Band(
    np.concatenate([b.mask for b in bands]),
    np.concatenate([b.samples for b in bands], axis=1),
  )


# --- Tiles --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Job:
  """A window of the image, seen in one view of it."""

  window: tuple[tuple[int, int], ...]
  view: windows.View
  picture: windows.Picture

  def read(
    self, axes: Sequence[geometry.TileAxis], normalization: dict[str, Any]
  ) -> tuple[np.ndarray, list[slice]]:
    """The tile, normalised, and where its output has the window."""
    own = [axes[a] for a in self.view.axes]
    place = self.view.window(self.window, [axis.size for axis in axes])
    starts = [axis.start(w) for axis, w in zip(own, place, strict=True)]
    tile = windows.read_mirrored(
      self.picture,
      [s - axis.pad for s, axis in zip(starts, own, strict=True)],
      [axis.tile for axis in own],
    )
    inside = [
      slice(low - s, high - s)
      for s, (low, high) in zip(starts, place, strict=True)
    ]
    return normalize.normalize(tile, normalization), inside


def _run(
  jobs: Sequence[_Job],
  axes: Sequence[geometry.TileAxis],
  apply: Apply,
  normalization: dict[str, Any],
  batch: int,
) -> Iterator[tuple[_Job, np.ndarray, np.ndarray]]:
  """(job, mask, samples) of each; the next batch is read while one computes."""
  # Turned tiles that are not square have another shape.
  by_shape: dict[tuple[int, ...], list[_Job]] = {}
  for job in jobs:
    shape = tuple(axes[a].tile for a in job.view.axes)
    by_shape.setdefault(shape, []).append(job)
  chunks = [
    own[i : i + batch]
    for own in by_shape.values()
    for i in range(0, len(own), batch)
  ]
  waiting = None
  for chunk in chunks:
    tiles, insides = zip(
      *(job.read(axes, normalization) for job in chunk), strict=True
    )
    # A batch that is not full repeats its last tile: one shape, one program.
    tiles = [*tiles, *[tiles[-1]] * (batch - len(tiles))]
    out = apply(np.stack(tiles))
    if waiting:
      yield from _fetch(*waiting)
    waiting = chunk, insides, out
  if waiting:
    yield from _fetch(*waiting)


def _fetch(
  chunk: Sequence[_Job], insides: Sequence[list[slice]], out: tuple[Any, Any]
) -> Iterator[tuple[_Job, np.ndarray, np.ndarray]]:
  masks, samples = (np.asarray(x) for x in out)
  for i, (job, inside) in enumerate(zip(chunk, insides, strict=True)):
    window = tuple(inside)
    mask = job.view.undo(masks[i][window])
    values = job.view.undo(samples[(slice(None), i, *window)], first=1)
    yield job, mask, values


# --- Sums ---------------------------------------------------------------------


class _Sum:
  """Weighted sums of the tiles of one row, over what the last row left."""

  def __init__(
    self, row: tuple[int, int], rest: Sequence[int], old: "_Sum | None"
  ):
    self._row, self._rest = row, tuple(rest)
    self._mask: np.ndarray | None = None
    self._values: np.ndarray | None = None
    self._weights: np.ndarray | None = None
    self._old = old

  def add(
    self,
    window: Sequence[tuple[int, int]],
    mask: np.ndarray | None,
    samples: np.ndarray,
    weight: np.ndarray,
  ) -> None:
    """Adds a window: its mask, if it is final, and weighted probabilities."""
    if self._values is None:
      self._start(samples)
    place = tuple(slice(*w) for w in window[1:])
    if mask is not None:
      self._mask[(slice(None), *place)] = mask
      self._values[(slice(None), slice(None), *place)] = samples
      return
    self._values[(slice(None), slice(None), *place)] += samples * weight
    self._weights[(slice(None), *place)] += weight

  def _start(self, samples: np.ndarray) -> None:
    first, stop = self._row
    shape = (stop - first, *self._rest)
    self._mask = np.zeros(shape, np.uint8)
    self._weights = np.zeros((*shape, 1), np.float32)
    shape = (len(samples), *shape, samples.shape[-1])
    self._values = np.zeros(shape, samples.dtype)
    if self._old is not None and self._old._row[1] > first:
      left = self._old._row[1] - first
      self._values[:, :left] = self._old._values[:, -left:]
      self._weights[:left] = self._old._weights[-left:]
    self._old = None

  def finish(self, stop: int) -> Band:
    """The rows up to `stop`, to which no later tile adds."""
    count = stop - self._row[0]
    values, weights = self._values[:, :count], self._weights[:count]
    if not weights.any():  # The masks are final.
      return Band(self._mask[:count], values)
    samples = values / weights
    return Band(most_probable(samples.mean(0)), samples)


def most_probable(probability: np.ndarray) -> np.ndarray:
  """Class ids uint8 [...] of probabilities [..., K]; K = 1: above 1/2."""
  if probability.shape[-1] == 1:
    return (probability[..., 0] > 0.5).astype(np.uint8)
  return probability.argmax(-1).astype(np.uint8)


def _overlap(axes: Sequence[geometry.TileAxis]) -> bool:
  return any(
    a[1] > b[0] for axis in axes for a, b in itertools.pairwise(axis.windows)
  )


def _weight(
  window: Sequence[tuple[int, int]], axes: Sequence[geometry.TileAxis]
) -> np.ndarray:
  """1, or where windows overlap a Gaussian around the window's centre.

  float32 [*S, 1]; its standard deviation is an eighth of the window, as nnU-Net
  has it (Isensee et al. 2021, https://doi.org/10.1038/s41592-020-01008-z).
  """
  total = np.ones((), np.float32)
  for (start, stop), axis in zip(window, axes, strict=True):
    n = stop - start
    bell = np.ones(n, np.float32)
    if _overlap([axis]):
      x = np.arange(n) - (n - 1) / 2
      # Never 0, so that the corners of the image have a value.
      bell = np.maximum(np.exp(-0.5 * (8 * x / n) ** 2), 1e-4)
    total = total[..., None] * bell.astype(np.float32)
  return total[..., None]
