"""Whether a network is right as often as it says.

The confidence of a pixel is the probability of its most probable class. Pixels
are put in `NUM_BINS` equal bins of confidence; over a data set the bins of all
images are added up.

Reference: Guo et al. 2017, https://arxiv.org/abs/1706.04599.
"""

import numpy as np

NUM_BINS = 15


def bin_confidence(
  probability: np.ndarray, label: np.ndarray, counted: np.ndarray
) -> np.ndarray:
  """Counts one image by confidence.

  Args:
    probability: of each class, float32 [*S, L], L >= 2.
    label: true class ids, int [*S].
    counted: False where a pixel counts nowhere, bool [*S].

  Returns:
    float64 [NUM_BINS, 3]: in bin m, confidences in (m, m + 1] / NUM_BINS; the
    pixels, the sum of their confidences, and how many of them are right.
  """
  probability, label = probability[counted], label[counted]
  # The smallest id on a tie, as `metrics.predict_labels`.
  predicted = probability.argmax(-1)
  confidence = probability.max(-1, initial=0.0).astype(np.float64)
  bins = np.clip(np.ceil(confidence * NUM_BINS) - 1, 0, NUM_BINS - 1)
  columns = (np.ones(len(bins)), confidence, predicted == label)
  return np.stack(
    [np.bincount(bins.astype(int), c, NUM_BINS) for c in columns], axis=-1
  )


def expected_error(bins: np.ndarray) -> float:
  """Mean distance of accuracy and confidence over the pixels: the ECE.

  sum over bins of |right - sum of confidences| / all pixels; 0 at best, NaN
  without a pixel.
  """
  total = bins[:, 0].sum()
  if not total:
    return float("nan")
  return float(np.abs(bins[:, 2] - bins[:, 1]).sum() / total)
