"""Objects of the truth, against skimage and by hand."""

import numpy as np
from skimage import measure

from unet_jax.objectives.objects import find_objects


def test_objects_of_a_picture_known_by_hand():
  truth = np.array([[1, 1, 0, 2], [0, 0, 1, 2], [1, 0, 0, 2]])
  prediction = np.array([[1, 0, 0, 2], [0, 0, 0, 1], [1, 1, 0, 2]])
  weight = np.ones(truth.shape)
  pixels, found = find_objects(truth, prediction, weight, (1, 2))
  assert pixels == [2, 1, 1, 3] and found == [0.5, 0.0, 1.0, 2 / 3]
  weight[0, 3] = weight[2, 0] = 0
  pixels, found = find_objects(truth, prediction, weight, (1, 2))
  assert pixels == [2, 1, 2] and found == [0.5, 0.0, 0.5]
  assert find_objects(truth, prediction, weight, (3,)) == ([], [])


def test_objects_are_those_of_skimage_in_two_and_three_dimensions():
  rng = np.random.default_rng(0)
  for size in ((40, 30), (8, 9, 10)):
    truth, guess = rng.random((2, *size)) < 0.5
    pixels, found = find_objects(truth, guess, np.ones(size), (1,))
    parts = measure.label(truth, connectivity=1)
    regions = measure.regionprops(parts)
    assert sorted(pixels) == sorted(int(r.area) for r in regions)
    right = sum(n * share for n, share in zip(pixels, found, strict=True))
    assert round(right) == (truth & guess).sum()
