"""How two partitions of an image into objects agree: Rand and information.

Objects are int [*S]: 0 = none (background, border, or what counts nowhere),
else an id. All scores look only where the truth has an object. With n_st the
pixels that object s of the prediction shares with object t of the truth, and
n_s and n_t the sums over t and s, each score follows from squares or logarithms
of these counts alone.
"""

import numpy as np

from unet_jax.objectives import topology

# Where the ISBI challenge cuts the probability of an object.
THRESHOLDS = tuple(k / 10 for k in range(1, 10))


def contingency(
  truth: np.ndarray, predicted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Ids of each pair of objects that share pixels, and how many, int64 [P].

  Pairs in which the truth has no object are left out; the prediction's 0 is an
  id like others.
  """
  inside = truth > 0
  base = int(predicted.max(initial=0)) + 1
  keys = truth[inside].astype(np.int64) * base + predicted[inside]
  pairs, counts = np.unique(keys, return_counts=True)
  return pairs // base, pairs % base, counts


def rand_scores(
  truth: np.ndarray, predicted: np.ndarray
) -> tuple[float, float, float]:
  """Adapted Rand error, precision and recall of pairs of pixels.

  Of the pairs of pixels in one predicted object (0 is one too), precision is
  the share that lies in one true object; recall the other way round. The error
  is 1 - 2PR / (P + R), 0 at best; merged objects lower P, split ones R. NaN
  where a side has no pair, as where the truth has no object.

  Reference: the SNEMI3D challenge; Arganda-Carreras et al. 2015,
  https://doi.org/10.3389/fnana.2015.00142.
  """
  t, s, counts = contingency(truth, predicted)
  both, of_truth, of_predicted = (
    _squares(n) - counts.sum()
    for n in (counts, _sums(t, counts), _sums(s, counts))
  )
  if not of_truth or not of_predicted:
    return (float("nan"),) * 3
  error = 1 - 2 * both / (of_truth + of_predicted)
  return float(error), float(both / of_predicted), float(both / of_truth)


def information_scores(
  truth: np.ndarray, predicted: np.ndarray
) -> tuple[float, float, float]:
  """Variation of information, and its parts, in bits.

  Split: H(S | T), what is not known of the predicted object once the true one
  is. Merge: H(T | S). The first is their sum, 0 at best. NaN where the truth
  has no object.

  Reference: Meila 2007, https://doi.org/10.1016/j.jmva.2006.11.013; the
  prediction's 0 is an object, as in skimage's `variation_of_information`.
  """
  t, s, counts = contingency(truth, predicted)
  if not counts.size:
    return (float("nan"),) * 3
  joint = _entropy(counts)
  split = joint - _entropy(_sums(t, counts))
  merge = joint - _entropy(_sums(s, counts))
  # Rounding may leave a little less than nothing.
  split, merge = max(split, 0.0), max(merge, 0.0)
  return split + merge, split, merge


def isbi_scores(
  truth: np.ndarray, objects: np.ndarray, counted: np.ndarray
) -> tuple[float, float]:
  """The two scores of the ISBI 2012 challenge, in [0, 1], 1 at best.

  The border between the predicted objects is thinned (`topology.thin`), the
  objects are what hangs together over sides, and a pixel of border that is left
  is an object of its own. Only pixels where the truth has an object count, so
  that the width of borders matters on neither side. NaN where it has none.

  Args:
    truth: ids of the true objects, int [H, W].
    objects: where the prediction has an object, bool [H, W].
    counted: False where a pixel counts nowhere, bool [H, W]; border there.

  Returns:
    V_rand = 2 sum n_st^2 / (sum n_s^2 + sum n_t^2), and
    V_info = 2 I(S; T) / (H(S) + H(T)), 1 where both have one object.

  Reference: Arganda-Carreras et al. 2015, https://doi.org/10.3389/fnana.2015.00142
  (both with alpha = 1/2).
  """
  found = topology.components(topology.thin(objects & counted))
  truth = np.where(counted, truth, 0)
  t, s, counts = contingency(truth, found)
  if not counts.size:
    return float("nan"), float("nan")
  alone, ones = s == 0, np.ones(counts[s == 0].sum(), np.int64)
  joint = np.append(counts[~alone], ones)
  of_truth = _sums(t, counts)
  of_found = np.append(_sums(s[~alone], counts[~alone]), ones)
  rand = 2 * _squares(joint) / (_squares(of_truth) + _squares(of_found))
  either = _entropy(of_truth) + _entropy(of_found)
  shared = either - _entropy(joint)
  return float(rand), float(2 * shared / either) if either > 0 else 1.0


def _sums(ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Pixels of each id, int64; those of ids that are not there are left out."""
  _, places = np.unique(ids, return_inverse=True)
  sums = np.zeros(places.max(initial=-1) + 1, np.int64)
  np.add.at(sums, places, counts)
  return sums


def _squares(counts: np.ndarray) -> int:
  """Exact up to 2^31 pixels an image."""
  return int((counts * counts).sum())


def _entropy(counts: np.ndarray) -> float:
  share = counts / counts.sum()
  return float(-(share * np.log2(share)).sum())
