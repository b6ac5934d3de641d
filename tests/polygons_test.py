"""Outlines, filled again by counting crossings."""

import itertools
import json

import numpy as np
import pytest
from scipy import ndimage

from unet_jax import polygons
from unet_jax.errors import UserError


def fill(rings, shape):
  """Pixels whose centre an odd number of vertical sides lies right of."""
  rows, columns = np.indices(shape) + 0.5
  crossings = np.zeros(shape, int)
  for ring in rings:
    for (x, top), (other, bottom) in itertools.pairwise(ring):
      if x == other:
        low, high = sorted((top, bottom))
        crossings += (x > columns) & (rows > low) & (rows < high)
  return crossings % 2 == 1


def area(ring):
  x, y = np.array(ring).T
  return (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2


@pytest.mark.parametrize("labels", [2, 3])
def test_filled_again_polygons_are_the_mask(labels):
  """Noise has holes, islands in holes, and pixels that touch at corners."""
  rng = np.random.default_rng(labels)
  for _ in range(60):
    mask = rng.integers(0, labels, rng.integers(1, 14, 2)).astype(np.uint8)
    numbered = polygons.instances(mask)
    found = json.loads(polygons.geojson(mask, numbered))
    again = np.zeros_like(mask)
    for feature in found["features"]:
      rings = feature["geometry"]["coordinates"]
      assert all(ring[0] == ring[-1] for ring in rings)
      assert area(rings[0]) > 0 and all(area(r) < 0 for r in rings[1:])
      inside = fill(rings, mask.shape)
      assert inside.sum() == feature["properties"]["pixels"]
      assert ndimage.label(inside)[1] == 1
      again[inside] = feature["properties"]["class"]
    np.testing.assert_array_equal(again, mask)


def test_a_square_has_four_corners_and_a_ring_a_hole():
  mask = np.zeros((6, 7), np.uint8)
  mask[1:5, 2:6] = 1
  mask[2:4, 3:5] = 0
  rings = polygons.outlines(polygons.instances(mask))[1]
  assert [len(ring) for ring in rings] == [5, 5]
  assert [area(ring) for ring in rings] == [16, -4]
  assert rings[0][0] == [2, 1]


def test_instances_are_numbered_by_class_and_side():
  mask = np.array([[1, 1, 2], [0, 2, 1], [1, 0, 1]], np.uint8)
  numbered = polygons.instances(mask)
  assert len(np.unique(numbered[numbered > 0])) == 5
  for number in range(1, numbered.max() + 1):
    own = numbered == number
    assert ndimage.label(own)[1] == 1 and len(set(mask[own])) == 1
  board = np.indices((600, 600)).sum(0) % 2
  with pytest.raises(UserError, match="180000 regions"):
    polygons.as_uint16(polygons.instances(board), "board")
