"""Warping and thinning beside brute force, and by hand."""

import numpy as np
import pytest
from scipy import ndimage

from unet_jax.objectives import topology


def count_pieces(mask):
  """Objects (4 neighbours) and pieces of border (8), with the outside."""
  mask = np.pad(mask, 1)  # Beyond the image lies border.
  return ndimage.label(mask)[1], ndimage.label(~mask, np.ones((3, 3)))[1]


def owners(before, after):
  """Which objects and pieces of border of two masks share pixels."""
  pairs = []
  for flip, structure in ((False, None), (True, np.ones((3, 3)))):
    a, b = (
      ndimage.label(np.pad(m, 1) ^ flip, structure)[0] for m in (before, after)
    )
    both = (a > 0) & (b > 0)
    pairs.append(set(zip(a[both].tolist(), b[both].tolist(), strict=True)))
  return pairs


def is_simple_by_counting(mask, row, column):
  """A flip of the whole mask, its pieces counted before and after.

  Equal counts are not enough (one may go while another comes), so the pieces
  must also be the same ones.
  """
  flipped = mask.copy()
  flipped[row, column] ^= True
  if count_pieces(mask) != count_pieces(flipped):
    return False
  # Each piece meets just one of the other mask's pieces, both ways round.
  for pairs, count in zip(
    owners(mask, flipped), count_pieces(mask), strict=True
  ):
    if len(pairs) != count:
      return False
  return True


def nearest_warping(start, target, downhill):
  """Fewest differing pixels over every warping of `start`: all are visited.

  `downhill`: over those that only flip pixels which differ, in any order.
  """
  seen, todo, best = {start.tobytes()}, [start], start.size
  while todo:
    mask = todo.pop()
    best = min(best, np.count_nonzero(mask != target))
    for row, column in np.ndindex(mask.shape):
      if downhill and mask[row, column] == target[row, column]:
        continue
      other = mask.copy()
      other[row, column] ^= True
      key = other.tobytes()
      if key not in seen and is_simple_by_counting(mask, row, column):
        seen.add(key)
        todo.append(other)
  return best


def test_a_simple_flip_changes_no_piece():
  """In images where pieces also meet far from the pixel, and do not."""
  rng = np.random.default_rng(0)
  found = 0
  for _ in range(400):
    mask = rng.random((5, 5)) < 0.5
    around = np.delete(mask[1:4, 1:4].ravel(), 4)
    simple = topology._simple_codes()[around @ (1 << np.arange(8))]
    assert simple == locally_once(mask, (2, 2))
    if simple:
      found += 1
      assert is_simple_by_counting(mask, 2, 2)
  assert 50 < found < 300


def test_relaxation_beside_every_warping_of_small_images():
  """Never better than the best order of flips, and mostly as good."""
  as_good = 0
  for seed in range(20):
    rng = np.random.default_rng(seed)
    shape = [(3, 4), (4, 4), (4, 3)][seed % 3]
    start, target = rng.random((2, *shape)) < rng.uniform(0.3, 0.8)
    best = nearest_warping(start, target, downhill=True)
    warped = topology.relax(start, target)
    left = np.count_nonzero(warped != target)
    assert count_pieces(warped) == count_pieces(start)
    assert left >= best
    as_good += left == best
    error = topology.warping_error(start, target, np.ones(shape, bool))
    assert error == left / start.size
  assert as_good >= 14


def test_a_border_can_only_be_far_away_uphill():
  """What the greedy form costs: Jain's own minimum goes through agreement."""
  start, target = np.ones((2, 2, 5), bool)
  start[:, 1] = target[:, 3] = False
  assert nearest_warping(start, target, downhill=False) == 0
  left = nearest_warping(start, target, downhill=True)
  warped = topology.relax(start, target)
  assert np.count_nonzero(warped != target) == left == 3


def one_by_one(start, target):
  """The greedy relaxation pixel by pixel, each flip judged on the whole mask.

  In the order of the rounds: by parity of row and column (the padded ones).
  """
  state = start.copy()
  order = sorted(
    np.ndindex(state.shape), key=lambda p: ((p[0] + 1) % 2, (p[1] + 1) % 2, *p)
  )
  changed = True
  while changed:
    changed = False
    for pixel in order:
      if state[pixel] == target[pixel]:
        continue
      if is_simple_by_counting(state, *pixel) and locally_once(state, pixel):
        state[pixel] ^= True
        changed = True
  return state


def locally_once(mask, pixel):
  """The definition on the 3x3 window, by counting its pieces."""
  row, column = pixel
  window = np.pad(mask, 1)[row : row + 3, column : column + 3].copy()
  window[1, 1] = False
  pieces = ndimage.label(window)[0]
  touching = {pieces[0, 1], pieces[1, 0], pieces[1, 2], pieces[2, 1]} - {0}
  border = ~window
  border[1, 1] = False
  return len(touching) == 1 and ndimage.label(border, np.ones((3, 3)))[1] == 1


@pytest.mark.parametrize("seed", range(4))
def test_relaxation_is_that_of_one_pixel_after_another(seed):
  rng = np.random.default_rng(seed)
  smooth = lambda: ndimage.gaussian_filter(rng.normal(size=(14, 17)), 1.0) > 0
  start, target = smooth(), smooth()
  np.testing.assert_array_equal(
    topology.relax(start, target), one_by_one(start, target)
  )


def two_cells(border_at, width=1, gap=None):
  cells = np.ones((9, 15), bool)
  cells[:, border_at : border_at + width] = False
  if gap is not None:
    cells[gap, border_at : border_at + width] = True
  return cells


def test_warping_forgives_place_and_counts_topology():
  everywhere = np.ones((9, 15), bool)
  error = lambda a, b: topology.warping_error(a, b, everywhere)
  truth = two_cells(6, 3)
  assert error(truth, truth) == 0
  assert error(truth, two_cells(4, 3)) == 0  # The border moved.
  assert error(truth, two_cells(8)) == 0  # It is thin, and elsewhere.
  assert error(truth, two_cells(5, 5)) == 0  # It is wide.
  assert error(truth, two_cells(6, 3, gap=4)) == 1 / 135  # Open at one pixel.
  split = truth.copy()
  split[:, 2] = False
  assert error(truth, split) == 1 / 135  # A line but for one pixel.
  merged = np.ones((9, 15), bool)
  assert error(truth, merged) == 9 / 135  # The truth's border, as a line.
  assert np.isnan(topology.warping_error(truth, truth, ~everywhere))


def test_what_does_not_count_changes_no_warping_error():
  rng = np.random.default_rng(0)
  truth, predicted = rng.random((2, 20, 20)) < 0.6
  counted = np.ones((20, 20), bool)
  counted[4:11, 3:15] = False
  expected = topology.warping_error(truth, predicted, counted)
  junk = rng.random((2, 20, 20)) < 0.5
  changed = [
    np.where(counted, m, j)
    for m, j in zip((truth, predicted), junk, strict=True)
  ]
  assert topology.warping_error(*changed, counted) == expected


def test_thinning_keeps_the_cells_and_the_middle_of_the_border():
  cells = two_cells(4, 5)
  np.testing.assert_array_equal(topology.thin(cells), two_cells(6))
  spur = two_cells(7)
  spur[4, 2:7] = False  # A line that ends inside a cell goes.
  assert topology.thin(spur)[4, 2:6].all()
  assert count_pieces(topology.thin(spur)) == count_pieces(spur)
  hole = np.ones((9, 9), bool)
  hole[2:6, 3:7] = False
  assert np.count_nonzero(~topology.thin(hole)) == 1


@pytest.mark.parametrize("seed", range(4))
def test_thinning_changes_no_piece_and_leaves_nothing_thick(seed):
  noise = np.random.default_rng(seed).normal(size=(60, 50))
  cells = ndimage.gaussian_filter(noise, 2.5) > 0
  thinned = topology.thin(cells)
  assert count_pieces(thinned) == count_pieces(cells)
  assert (thinned | ~cells).all()  # Objects only grow.
  thick = ~thinned[:-1, :-1] & ~thinned[1:, :-1] & ~thinned[:-1, 1:]
  assert not (thick & ~thinned[1:, 1:]).any()
