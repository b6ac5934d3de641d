"""Scores by object: the connected parts of the truth, on the host."""

import numpy as np
from scipy import ndimage


def find_objects(
  truth: np.ndarray,
  prediction: np.ndarray,
  weight: np.ndarray,
  classes: tuple[int, ...],
) -> tuple[list[int], list[float]]:
  """The size of each object of the truth, and how much of it was found.

  An object is a part of one class whose pixels are connected by faces; cells
  of a class that touch are one.

  Args:
    truth: int [*S], class ids.
    prediction: the same.
    weight: float [*S]; where it is 0 there is no object.
    classes: those whose parts are objects.

  Returns:
    Pixels of each object, and the share of them predicted as its class.
  """
  pixels, found = [], []
  for k in classes:
    parts, number = ndimage.label((truth == k) & (weight > 0))
    sizes = np.bincount(parts.ravel(), minlength=number + 1)[1:]
    right = np.bincount(parts[prediction == k], minlength=number + 1)[1:]
    pixels += sizes.tolist()
    found += (right / sizes).tolist()
  return pixels, found
