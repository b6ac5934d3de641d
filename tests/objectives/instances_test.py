"""Objects from pixels, and matched objects, beside brute force."""

import numpy as np
import pytest
import skimage.segmentation
from scipy import ndimage

from unet_jax.objectives import instances, topology


def noise(seed, shape=(30, 34), blur=1.5):
  field = np.random.default_rng(seed).normal(size=shape)
  return ndimage.gaussian_filter(field, blur)


def scores_by_loops(truth, predicted):
  """Every pair of objects, as sets of pixels."""

  def pixel_sets(objects):
    flat = objects.ravel()
    return [set(np.flatnonzero(flat == i)) for i in np.unique(flat) if i]

  trues, found = pixel_sets(truth), pixel_sets(predicted)
  iou = lambda a, b: len(a & b) / len(a | b)

  def hits(tenth_of_half):
    return [
      iou(a, b)
      for a in trues
      for b in found
      if 20 * len(a & b) > tenth_of_half * len(a | b)
    ]

  def precision(k):
    tp = len(hits(k))
    return tp / (len(trues) + len(found) - tp)

  tp = len(hits(10))
  fp, fn = len(found) - tp, len(trues) - tp
  above, below, used = 0, 0, set()
  for a in trues:
    meets = [k for k, b in enumerate(found) if a & b]
    if not meets:
      below += len(a)
      continue
    k = max(meets, key=lambda k: (iou(a, found[k]), -k))
    used.add(k)
    above += len(a & found[k])
    below += len(a | found[k])
  below += sum(len(b) for k, b in enumerate(found) if k not in used)
  return {
    "ap": np.mean([precision(k) for k in range(10, 20)]),
    "ap50": precision(10),
    "ap75": precision(15),
    "f1": 2 * tp / (2 * tp + fp + fn),
    "pq": sum(hits(10)) / (tp + fp / 2 + fn / 2),
    "aji": above / below,
  }


@pytest.mark.parametrize("seed", range(6))
def test_scores_are_those_of_all_pairs_of_objects(seed):
  field = noise(seed)
  truth = topology.components(field > 0.05)
  # From nearly equal to nothing in common.
  other = field + noise(seed + 50) * seed / 4
  predicted = topology.components(other > 0.06)
  rng = np.random.default_rng(seed)  # Ids in any order, with gaps.
  predicted = rng.permutation(np.arange(1, 500))[predicted - 1] * (
    predicted > 0
  )
  expected = scores_by_loops(truth, predicted)
  ours = instances.match_scores(truth, predicted)
  # AJI's ties may fall to another id of equal IoU: there are none here.
  np.testing.assert_allclose(
    [ours[k] for k in expected], list(expected.values()), rtol=1e-12
  )
  assert len(ours) == len(expected) and expected["aji"] < 1


def test_matches_by_hand():
  """IoU 0.5 is no hit, 0.75 is one up to 0.7; one is missed, one false."""
  truth, predicted = np.zeros((2, 4, 12), np.int32)
  truth[0, 0:4], predicted[0, 1:4] = 1, 4  # 3 / 4
  truth[1, 0:4], predicted[1, 0:2] = 2, 5  # 2 / 4
  truth[2, 0:2], predicted[3, 6:12] = 3, 6
  scores = instances.match_scores(truth, predicted)
  # 3 true, 3 found; one hit at 0.5, 0.55, 0.6, 0.65, 0.7.
  assert scores["ap50"] == 1 / 5
  assert scores["ap75"] == 0
  np.testing.assert_allclose(scores["ap"], 5 / 10 / 5)
  assert scores["f1"] == 2 / 6
  np.testing.assert_allclose(scores["pq"], 0.75 / 3)
  np.testing.assert_allclose(scores["aji"], (3 + 2) / (4 + 4 + 2 + 6))


def test_one_side_without_objects():
  none, some = np.zeros((3, 3), np.int32), np.eye(3, dtype=np.int32)
  assert all(np.isnan(v) for v in instances.match_scores(none, none).values())
  for a, b in ((none, some), (some, none)):
    assert set(instances.match_scores(a, b).values()) == {0.0}
  assert set(instances.match_scores(some, some).values()) == {1.0}


@pytest.mark.parametrize("shape", [(30, 34), (16, 18, 15), (80,)])
def test_watershed_is_that_of_skimage(shape):
  height = noise(3, shape).astype(np.float32)
  region = noise(4, shape, 2.0) > -0.1
  seeds = topology.components(noise(5, shape) > 0.15)
  theirs = skimage.segmentation.watershed(
    height, seeds * region, mask=region, connectivity=1
  )
  ours = instances.watershed(height, seeds, region)
  np.testing.assert_array_equal(ours, theirs)
  assert ours.dtype == np.int32 and len(np.unique(ours)) > 2


def test_a_flat_watershed_meets_half_way():
  """First come, first served: each pixel goes to its nearest seed."""
  region = np.ones((15, 15), bool)
  seeds = np.zeros((15, 15), np.int32)
  seeds[3, 2], seeds[10, 12] = 1, 2
  ids = instances.watershed(np.zeros((15, 15)), seeds, region)
  rows, columns = np.indices(ids.shape)
  one = abs(rows - 3) + abs(columns - 2)
  other = abs(rows - 10) + abs(columns - 12)
  assert (ids[one < other] == 1).all() and (ids[one > other] == 2).all()


def test_a_boundary_class_parts_what_touches():
  """Two nuclei side by side: components of the foreground see one."""
  label = np.zeros((7, 11), int)
  label[1:6, 1:10] = 1
  merged = instances.from_components(np.where(label > 0, 1, 0), (1,))
  label[1:6, 5] = 2
  probability = np.eye(3, dtype=np.float32)[label]
  grown = instances.from_watershed(
    label, probability, (1,), boundary=2, threshold=0.5
  )
  assert merged.max() == 1
  assert grown.max() == 2
  np.testing.assert_array_equal(grown > 0, label > 0)
  assert set(grown[3, [1, 4]]) == {1} and set(grown[3, [6, 9]]) == {2}


def test_a_higher_threshold_closes_a_gap_in_a_membrane():
  inside = np.full((9, 15), 0.9, np.float32)
  inside[:, 7] = 0.1
  inside[4, 7] = 0.6  # The argmax has a gap.
  probability = np.stack([1 - inside, inside], -1)
  label = probability.argmax(-1)
  grow = lambda threshold: instances.from_watershed(
    label, probability, (1,), boundary=0, threshold=threshold
  )
  assert grow(0.5).max() == 1
  assert grow(0.8).max() == 2
  assert (grow(0.8) > 0).all()


def test_touching_classes_are_different_objects():
  label = np.int32([[1, 1, 2, 2, 0, 1]])
  np.testing.assert_array_equal(
    instances.from_components(label, (1, 2)), [[1, 1, 3, 3, 0, 2]]
  )
  np.testing.assert_array_equal(
    instances.from_components(label, (2,)), [[0, 0, 1, 1, 0, 0]]
  )
