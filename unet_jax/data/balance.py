"""Class weights from the pixels of the training split."""

from concurrent import futures

import numpy as np

from unet_jax.data.source import Source
from unet_jax.runtime import writers


def fit_class_weights(
  source: Source, num_labels: int, *, num_threads: int = 8
) -> list[float]:
  """N / (L n_k) for each of the L classes, n_k its counted pixels of N.

  All classes then weigh the same in a sum over pixels, and the mean weight of a
  pixel is 1. A class without a pixel has weight 1.

  Reference: King and Zeng 2001, https://doi.org/10.1093/oxfordjournals.pan.a004868,
  section 4.3; scikit-learn's class_weight="balanced".
  """
  with futures.ThreadPoolExecutor(num_threads) as pool:
    counts = pool.map(
      lambda i: class_counts(source, i, num_labels),
      writers.track(range(len(source)), "counting classes, example"),
    )
    total = np.sum(list(counts), axis=0)
  return [
    float(total.sum() / (num_labels * n)) if n else 1.0 for n in total.tolist()
  ]


def class_counts(source: Source, index: int, num_labels: int) -> np.ndarray:
  """Counted pixels of each class of an example, int64 [num_labels]."""
  example = source[index]
  label = example["label"][example["weight"] > 0]
  return np.bincount(label, minlength=num_labels)[:num_labels]
