"""What no network is needed for: the scores that a network has to beat.

Three predictors are fit on train and scored on another split, in one pass over
each, from counts: the most frequent class; a threshold (each image's own, after
Otsu, with the two classes that suit train best), or of tokens the most frequent
class of each word; and the most frequent class of each place.
"""

import itertools
import math
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from unet_jax.objectives import metrics

# Bins of a threshold's histogram; entries of the prior; classes that the
# threshold is tried with.
_BINS, _MOST_ENTRIES, _TRIED = 256, 2**24, 12


class Baselines:
  """The three predictors: `add` all of train, then `score` the others.

  Safe to use from many threads. Labels are int [*S] of 0..num_labels-1, weights
  [*S], images [*S, C]; integer ones hold words, ids from 0, in channel 0.
  """

  def __init__(
    self,
    num_labels: int,
    sizes: Sequence[tuple[int, ...]],
    foreground: tuple[int, ...],
  ):
    self._foreground = foreground
    self._sides = np.zeros((2, num_labels), np.int64)  # Dark and bright.
    self._words = np.zeros((0, num_labels), np.int64)
    grid = Counter(sizes).most_common(1)[0][0] if sizes else (1,)
    while math.prod(grid) * num_labels > _MOST_ENTRIES:
      grid = tuple(-(-n // 2) for n in grid)
    self._prior = np.zeros((*grid, num_labels), np.float32)
    self._lock = threading.Lock()

  def add(
    self, image: np.ndarray, label: np.ndarray, weight: np.ndarray
  ) -> None:
    """Learns from one example of train."""
    sides = self._count_sides(image, label, weight)
    grid = self._prior.shape[:-1]
    places = _places(grid, label.shape)
    chosen, counts = label[places], (weight[places] > 0).astype(np.float32)
    index = (*np.indices(grid, sparse=True), chosen)
    with self._lock:
      self._sides += sides
      self._prior[index] += counts
      if image.dtype.kind == "i":
        words, own = image[..., 0][weight > 0], label[weight > 0]
        more = max(int(words.max(initial=0)) + 1 - len(self._words), 0)
        self._words = np.pad(self._words, ((0, more), (0, 0)))
        np.add.at(self._words, (words, own), 1)

  def score(
    self, image: np.ndarray, label: np.ndarray, weight: np.ndarray
  ) -> dict[str, np.ndarray]:
    """Counts of one example: int [2, L] by side, confusions [L, L]."""
    # A place that train says nothing of gets class 0.
    best = self._prior.argmax(-1)
    place = best[_places(label.shape, best.shape)]
    counts = {"sides": self._count_sides(image, label, weight)}
    counts["place"] = self._compare(label, place, weight)
    if image.dtype.kind == "i":
      common = self._sides.sum(0).argmax()
      seen = self._words.any(1)
      table = np.append(np.where(seen, self._words.argmax(1), common), common)
      words = np.minimum(image[..., 0], len(table) - 1)
      counts["word"] = self._compare(label, table[words], weight)
    return counts

  def _compare(
    self, label: np.ndarray, predicted: np.ndarray, weight: np.ndarray
  ) -> np.ndarray:
    num, counted = self._sides.shape[1], weight > 0
    both = num * label[counted] + predicted[counted]
    return np.bincount(both, minlength=num * num).reshape(num, num)

  def summarize(
    self, scores: Sequence[dict[str, np.ndarray]]
  ) -> dict[str, dict[str, Any]]:
    """Scores by predictor, as of `metrics.summarize`, and what it predicts."""
    stacked = {k: np.stack([x[k] for x in scores]) for k in scores[0]}
    sides, most = stacked["sides"], int(self._sides.sum(0).argmax())
    made = {
      "majority class": (_confusion(sides, most, most), f"{most} everywhere")
    }
    if "word" in stacked:
      text = "the most frequent class of train of each word"
      made["word"] = stacked["word"], text
    else:
      dark, bright = self._choose_sides()
      text = f"{dark} where dark, {bright} where bright (Otsu, image by image)"
      made["threshold"] = _confusion(sides, dark, bright), text
    text = "the most frequent class of train at each place"
    made["location prior"] = stacked["place"], text
    return {
      name: {
        "predicts": text,
        **metrics.summarize(confusion, self._foreground),
      }
      for name, (confusion, text) in made.items()
    }

  def _choose_sides(self) -> tuple[int, int]:
    """The class of the dark and of the bright side, by Dice on train."""
    common = np.argsort(-self._sides.sum(0), kind="stable")[:_TRIED]

    def dice(pair: tuple[int, int]) -> float:
      confusion = _confusion(self._sides[None], *pair)
      value = metrics.summarize(confusion, self._foreground)["dice"]
      return -1.0 if math.isnan(value) else value

    pairs = itertools.permutations(common.tolist(), 2)
    return max(pairs, key=dice, default=(0, 0))

  def _count_sides(
    self, image: np.ndarray, label: np.ndarray, weight: np.ndarray
  ) -> np.ndarray:
    grey, num = image.mean(-1, dtype=np.float64), self._sides.shape[1]
    bright = (grey > otsu(grey)).astype(np.int64)
    both = (num * bright + label)[weight > 0]
    return np.bincount(both, minlength=2 * num).reshape(2, num)


def otsu(grey: np.ndarray) -> float:
  """The threshold of an image that best parts its values into two.

  Of 256 equal bins between minimum and maximum, the centre of that after which
  w0 w1 (m0 - m1)^2 is largest, w the shares and m the means of the two sides.

  Reference: Otsu 1979, https://doi.org/10.1109/TSMC.1979.4310076, equation 14.
  """
  low, high = float(grey.min()), float(grey.max())
  if not low < high:
    return high
  counts, edges = np.histogram(grey, _BINS, (low, high))
  centres = (edges[1:] + edges[:-1]) / 2
  below, above = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
  mean_below = np.cumsum(counts * centres) / below
  mean_above = np.cumsum((counts * centres)[::-1])[::-1] / above
  between = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
  return float(centres[np.argmax(between)])


def _confusion(sides: np.ndarray, dark: int, bright: int) -> np.ndarray:
  """[N, L, L] of predicting one class a side, from counts [N, 2, L]."""
  num = sides.shape[-1]
  confusion = np.zeros((len(sides), num, num), np.int64)
  confusion[:, :, dark] += sides[:, 0]
  confusion[:, :, bright] += sides[:, 1]
  return confusion


def _places(
  size: tuple[int, ...], of: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
  """For each pixel of `size` the nearest one of `of`, as an open mesh."""
  axes = [
    ((2 * np.arange(n) + 1) * m // (2 * n))
    for n, m in zip(size, of, strict=True)
  ]
  return np.ix_(*axes)
