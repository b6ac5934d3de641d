"""Surface distances beside the program of Nikolov et al., and by hand."""

import warnings

import numpy as np
import pytest
from scipy import ndimage

from unet_jax.objectives import surface


def published(truth, predicted, spacing, tolerance):
  """hd95, asd of both surfaces together, nsd by the package."""
  from surface_distance import metrics

  with warnings.catch_warnings():  # It names SciPy's old namespaces.
    warnings.simplefilter("ignore", DeprecationWarning)
    found = metrics.compute_surface_distances(truth, predicted, spacing)
  areas = found["surfel_areas_gt"].sum(), found["surfel_areas_pred"].sum()
  means = metrics.compute_average_surface_distance(found)
  return (
    metrics.compute_robust_hausdorff(found, 95),
    np.dot(means, areas) / np.sum(areas),
    metrics.compute_surface_dice_at_tolerance(found, tolerance),
  )


def blobs(seed, shape, share=0.4, blur=1.5):
  noise = np.random.default_rng(seed).normal(size=shape)
  smooth = ndimage.gaussian_filter(noise, blur)
  return smooth > np.quantile(smooth, 1 - share)


@pytest.mark.parametrize("blur", [0.0, 1.5])
@pytest.mark.parametrize(
  ("shape", "spacing"),
  [
    ((40, 33), (1.0, 1.0)),
    ((40, 33), (0.4, 2.5)),
    ((14, 17, 12), (1.0, 1.0, 1.0)),
    ((14, 17, 12), (3.0, 0.7, 1.3)),
  ],
)
def test_distances_are_those_of_the_published_program(shape, spacing, blur):
  for seed in range(3):
    truth = blobs(seed, shape, blur=blur)
    predicted = blobs(seed + 100, shape, 0.3, blur)
    ours = surface.surface_scores(
      truth,
      predicted,
      np.ones(shape, bool),
      spacing=spacing,
      tolerance=1.1,
    )
    np.testing.assert_allclose(
      ours, published(truth, predicted, spacing, 1.1), rtol=1e-12
    )


def test_every_element_has_the_published_size():
  """All 256 neighbourhoods of eight voxels, at an odd spacing."""
  from surface_distance import lookup_tables

  spacing = (3.0, 0.7, 1.3)
  table = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
  # There bit 7 is the first corner.
  mirrored = [int(f"{code:08b}"[::-1], 2) for code in range(256)]
  np.testing.assert_allclose(surface._size_table(spacing)[mirrored], table)


def test_two_bars_by_hand():
  """Truth 4 wide, prediction 2 pixels longer at one end, on one axis."""
  truth, predicted = np.zeros((2, 12), bool)
  truth[3:7], predicted[3:9] = True, True
  hd95, asd, nsd = surface.surface_scores(
    truth, predicted, np.ones(12, bool), spacing=(0.5,), tolerance=0.9
  )
  assert (hd95, asd, nsd) == (1.0, 0.5, 0.5)


def test_empty_surfaces():
  everywhere = np.ones((6, 8), bool)
  none, some = np.zeros((6, 8), bool), np.zeros((6, 8), bool)
  some[2:4, 3:6] = True
  score = lambda a, b, counted=everywhere: surface.surface_scores(
    a, b, counted, spacing=(1.0, 2.0), tolerance=1.0
  )
  assert np.isnan(score(none, none)).all()
  diagonal = np.hypot(6 * 1.0, 8 * 2.0)
  assert score(none, some) == (diagonal, diagonal, 0.0)
  assert score(some, none) == (diagonal, diagonal, 0.0)
  assert score(some, some) == (0.0, 0.0, 1.0)
  assert np.isnan(score(some, none, none)).all()


def test_what_does_not_count_changes_nothing():
  rng = np.random.default_rng(0)
  truth, predicted = blobs(1, (30, 40)), blobs(2, (30, 40))
  counted = np.ones((30, 40), bool)
  counted[5:20, 10:30] = False
  args = dict(spacing=(1.0, 1.0), tolerance=1.0)
  expected = surface.surface_scores(truth, predicted, counted, **args)
  for _ in range(3):
    junk = rng.random((2, 30, 40)) < 0.5
    a = np.where(counted, truth, junk[0])
    b = np.where(counted, predicted, junk[1])
    assert surface.surface_scores(a, b, counted, **args) == expected
  # Nor is the rim of the ignored region a surface.
  alike = surface.surface_scores(counted, counted, counted, **args)
  assert alike == (0.0, 0.0, 1.0)
