"""How sure a prediction is, and whether that finds its errors. NumPy alone.

Probabilities are float [..., K] of K classes; K = 1: of the foreground.
"""

import math

import numpy as np


def entropy(probability: np.ndarray) -> np.ndarray:
  """-sum_k p_k log p_k in nats, float [...]: 0 to log max(K, 2)."""
  if probability.shape[-1] == 1:
    probability = np.concatenate([probability, 1 - probability], axis=-1)
  # p log p -> 0 as p -> 0.
  logs = np.log(np.where(probability > 0, probability, 1))
  return -(probability * logs).sum(-1)


def mutual_information(samples: np.ndarray) -> np.ndarray:
  """What the members do not agree on: H(mean p) - mean H(p), in nats.

  `samples` are probabilities [N, ..., K] of N members or draws. 0 where all say
  the same, however unsure they are.

  Reference: Gal et al. 2017, https://arxiv.org/abs/1703.02910, equation 2.
  """
  return np.maximum(entropy(samples.mean(0)) - entropy(samples).mean(0), 0)


def highest(num_labels: int) -> float:
  """The largest uncertainty that there is: log num_labels."""
  return math.log(num_labels)


def risk_coverage(
  uncertainty: np.ndarray, errors: np.ndarray, counts: np.ndarray | None = None
) -> dict[str, float]:
  """Area under the risk-coverage curve (AURC).

  Pixels are taken from the surest on; the risk at coverage c is the error rate
  among the first share c of them, and AURC the mean risk over all coverages.
  Where pixels are equally sure they come in mixed order: errors as even as can
  be.

  Args:
    uncertainty: [N], one a group of equally sure pixels (or one a pixel).
    errors: [N], wrong pixels of each group.
    counts: [N], pixels of each group; None = 1 each.

  Returns:
    aurc; aurc_best, that of an order in which all errors come last; and risk,
    the error rate, which is the AURC of a random order.

  Reference: Geifman & El-Yaniv 2017, https://arxiv.org/abs/1705.08500; Geifman
    et al. 2019, https://arxiv.org/abs/1805.08206, section 3.
  """
  errors = np.asarray(errors, np.float64)
  counts = np.ones(len(errors)) if counts is None else np.asarray(counts, float)
  order = np.argsort(uncertainty, kind="stable")
  errors, counts = errors[order], counts[order]
  total, wrong = counts.sum(), errors.sum()
  if not total:
    return {"aurc": math.nan, "aurc_best": math.nan, "risk": math.nan}
  area = _area(np.array([total - wrong, wrong]), np.array([0.0, wrong]))
  return {
    "aurc": _area(counts, errors),
    "aurc_best": area,
    "risk": float(wrong / total),
  }


def _area(counts: np.ndarray, errors: np.ndarray) -> float:
  """Mean over n = 1..N of errors among the first n, divided by n.

  Within a group errors grow evenly, so that sum_n (e + r (n - m)) / n over its
  n from m + 1 to m + k is r k + (e - r m) (H(m + k) - H(m)), H harmonic.
  """
  kept = counts > 0
  counts, errors = counts[kept], errors[kept]
  ends, wrong = np.cumsum(counts), np.cumsum(errors)
  starts, before = ends - counts, wrong - errors
  rate = errors / counts
  harmonic = _harmonic(ends) - _harmonic(starts)
  area = rate * counts + (before - rate * starts) * harmonic
  return float(area.sum() / ends[-1])


def _harmonic(n: np.ndarray) -> np.ndarray:
  """1 + 1/2 + ... + 1/n."""
  from scipy import special

  return special.digamma(n + 1) + np.euler_gamma
