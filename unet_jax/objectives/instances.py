"""From pixels to objects, and how well objects are found.

Objects are int32 [*S]: 0 = none, else an id. They hang together over sides.
"""

import heapq
import itertools
from collections.abc import Sequence

import numpy as np

from unet_jax.objectives import partition, topology

# The IoU that a hit must exceed, in twentieths: 0.5, 0.55, ..., 0.95.
_TWENTIETHS = np.arange(10, 20)

# --- From pixels to objects ---------------------------------------------------


def from_components(label: np.ndarray, classes: Sequence[int]) -> np.ndarray:
  """Each piece of equal class is an object.

  Args:
    label: class ids, int [*S].
    classes: ids of the classes that objects have.
  """
  objects = np.zeros(label.shape, np.int32)
  for k in classes:
    pieces = topology.components(label == k)
    objects = np.where(pieces > 0, pieces + objects.max(initial=0), objects)
  return objects


def from_watershed(
  label: np.ndarray,
  probability: np.ndarray,
  classes: Sequence[int],
  *,
  boundary: int,
  threshold: float,
) -> np.ndarray:
  """Objects grown over the boundary class, which parts those that touch.

  Seeds are the pieces whose class has at least the probability `threshold`.
  They grow over what is predicted as boundary or as one of the classes, in the
  order of the boundary's probability (`watershed`). At 0.5 and of two classes,
  seeds are what `from_components` gives; higher, a weak boundary parts too.

  Args:
    label: predicted class ids, int [*S].
    probability: of each class, float32 [*S, L].
    classes: ids of the classes that objects have.
    boundary: id of the boundary class.
    threshold: least probability of a seed.
  """
  likely = np.full(label.shape, -1)
  for k in classes:
    likely[(probability[..., k] >= threshold) & (label == k)] = k
  seeds = from_components(likely, classes)
  region = np.isin(label, [*classes, boundary])
  return watershed(probability[..., boundary], seeds, region)


def watershed(
  height: np.ndarray, seeds: np.ndarray, region: np.ndarray
) -> np.ndarray:
  """Floods `region` from the seeds, lowest first, first come first served.

  Args:
    height: float [*S].
    seeds: ids, int32 [*S]; 0 = none.
    region: where ids may spread to, bool [*S].

  Returns:
    ids, int32 [*S]; a piece of the region without a seed stays 0.

  Reference: Meyer 1991, as in skimage's `watershed`, which gives the same ids
  where no two heights are equal.
  """
  ids = np.pad(np.where(region, seeds, 0), 1).astype(np.int32)
  shape, strides = ids.shape, np.array(ids.strides) // ids.itemsize
  ids = ids.ravel()
  free = np.pad(region, 1).ravel() & (ids == 0)
  level = np.pad(height, 1).ravel()
  steps = np.concatenate([-strides, strides[::-1]])
  seeded = np.flatnonzero(ids)
  seeded = seeded[free[seeded[:, None] + steps].any(1)]
  age = itertools.count()
  heap = [(level[i], next(age), i) for i in seeded.tolist()]
  heapq.heapify(heap)
  steps = steps.tolist()
  while heap:
    _, _, i = heapq.heappop(heap)
    for step in steps:
      j = i + step
      if free[j]:
        free[j], ids[j] = False, ids[i]
        heapq.heappush(heap, (level[j], next(age), j))
  return ids.reshape(shape)[(slice(1, -1),) * len(shape)]


# --- How well objects are found -----------------------------------------------


def match_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
  """Scores of one image's objects, in [0, 1], 1 at best.

  A true and a predicted object hit one another at t if their IoU is above t; at
  t >= 0.5 no object has two hits. TP are hits, FP and FN predicted and true
  objects without one. NaN where neither side has an object, 0 where one side
  has none.

  Returns:
    ap: TP / (TP + FP + FN), mean over t = 0.5, 0.55, ..., 0.95.
    ap50, ap75: the same at one t.
    f1: 2 TP / (2 TP + FP + FN) at 0.5.
    pq: sum of the hits' IoU / (TP + FP / 2 + FN / 2) at 0.5.
    aji: sum of intersections / sum of unions, over the true objects, each with
      the predicted object of its largest IoU (on its own, if it meets none),
      where predicted objects that nobody took add to the unions.

  Reference: ap: Data Science Bowl 2018, Caicedo et al. 2019,
  https://doi.org/10.1038/s41592-019-0612-7; pq: Kirillov et al. 2019,
  https://arxiv.org/abs/1801.00868; aji: Kumar et al. 2017,
  https://doi.org/10.1109/TMI.2017.2677499.
  """
  t_sizes, p_sizes = _sizes(truth), _sizes(predicted)
  num_truth, num_predicted = (
    np.count_nonzero(t_sizes),
    np.count_nonzero(p_sizes),
  )
  if not num_truth + num_predicted:
    return dict.fromkeys(("ap", "ap50", "ap75", "f1", "pq", "aji"), np.nan)
  t, p, shared = partition.contingency(truth, predicted)
  t, p, shared = t[p > 0], p[p > 0], shared[p > 0]
  union = t_sizes[t] + p_sizes[p] - shared
  # In whole numbers: an IoU of exactly t is no hit.
  is_hit = 20 * shared > _TWENTIETHS[:, None] * union
  hits = is_hit.sum(1)
  precision = hits / (num_truth + num_predicted - hits)
  pairs = num_truth + num_predicted
  iou = shared / union
  return {
    "ap": float(precision.mean()),
    "ap50": float(precision[0]),
    "ap75": float(precision[5]),
    "f1": float(2 * hits[0] / pairs),
    "pq": float(2 * iou[is_hit[0]].sum() / pairs),
    "aji": _aji(t, p, shared, union, t_sizes, p_sizes),
  }


def _sizes(objects: np.ndarray) -> np.ndarray:
  """Pixels of each id, int64; entry 0 is 0."""
  sizes = np.bincount(objects.ravel()).astype(np.int64)
  sizes[:1] = 0
  return sizes


def _aji(
  t: np.ndarray,
  p: np.ndarray,
  shared: np.ndarray,
  union: np.ndarray,
  t_sizes: np.ndarray,
  p_sizes: np.ndarray,
) -> float:
  # The largest IoU of each true object; on a tie the smaller predicted id.
  order = np.lexsort((p, -shared / union, t))
  _, first = np.unique(t[order], return_index=True)
  best = order[first]
  alone = t_sizes.sum() - t_sizes[t[best]].sum()
  unused = p_sizes.sum() - p_sizes[np.unique(p[best])].sum()
  return float(shared[best].sum() / (union[best].sum() + alone + unused))
