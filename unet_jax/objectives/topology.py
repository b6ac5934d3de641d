"""Flipping pixels without changing how objects hang together, in 2D.

A mask is bool [H, W]: objects are True and hang together over sides (4
neighbours), the border between them is False and hangs together over corners
too (8). Beyond the image lies border. A pixel is simple if its flip neither
makes, removes, joins nor splits an object or a piece of border: just when both
meet once among its 8 neighbours.

Reference: Jain et al. 2010, https://doi.org/10.1109/CVPR.2010.5539950; simple
points: Kong & Rosenfeld 1989,
https://doi.org/10.1016/0734-189X(89)90147-3.
"""

import functools

import numpy as np
from scipy import ndimage


def components(mask: np.ndarray) -> np.ndarray:
  """Numbers the pieces that hang together over sides, 1.., int32 [*S].

  On any number of axes.
  """
  return ndimage.label(mask, output=np.int32)[0]


def warping_error(
  truth: np.ndarray, predicted: np.ndarray, counted: np.ndarray
) -> float:
  """Share of the counted pixels that differ beyond a warping of the truth.

  That is, after `relax`. Borders that are thicker, or moved by less than their
  width, cost nothing; objects that are split, merged, missed or invented cost
  the pixels at fault. What counts nowhere is border in both. NaN where nothing
  counts.
  """
  truth, predicted = truth & counted, predicted & counted
  num_counted = np.count_nonzero(counted)
  if not num_counted:
    return float("nan")
  warped = relax(truth, predicted)
  return float(np.count_nonzero(warped != predicted) / num_counted)


def relax(start: np.ndarray, target: np.ndarray) -> np.ndarray:
  """Flips simple pixels of `start` that differ from `target` until none is.

  Greedy, in a fixed order: the result is a warping of `start` near `target`,
  not always the nearest one.
  """
  state, goal = np.pad(start, 1), np.pad(target, 1)
  differing = np.flatnonzero(state != goal)
  while True:
    flipped = _flip_simple(state, differing)
    if not flipped.any():
      return state[1:-1, 1:-1]
    differing = differing[~flipped]


def thin(objects: np.ndarray) -> np.ndarray:
  """Grows the objects until the border is one pixel wide where it parts them.

  Layer by layer from all sides. Lines with a free end go too: they part
  nothing. A piece of border inside one object shrinks to a pixel.
  """
  state = np.pad(objects, 1)
  sides = np.array([-state.shape[1], -1, 1, state.shape[1]])
  border = np.flatnonzero(np.pad(~objects, 1))
  while True:
    reached = state.ravel()[border[:, None] + sides].any(1)
    flipped = np.zeros(len(border), bool)
    flipped[reached] = _flip_simple(state, border[reached])
    if not flipped.any():
      return state[1:-1, 1:-1]
    border = border[~flipped]


def _flip_simple(state: np.ndarray, pixels: np.ndarray) -> np.ndarray:
  """Flips, in place, those of `pixels` (flat) that are simple in their turn.

  In four rounds: pixels of the same parity of row and column are no neighbours,
  so that each finds its own neighbourhood as if it were alone.
  """
  width, flat = state.shape[1], state.reshape(-1)
  around = np.array([-1, 0, 1]) + width * np.array([[-1], [0], [1]])
  around, bits = np.delete(around.ravel(), 4), 1 << np.arange(8)
  flipped = np.zeros(len(pixels), bool)
  turn = pixels // width % 2 * 2 + pixels % width % 2
  for parity in range(4):
    mine = np.flatnonzero(turn == parity)
    codes = flat[pixels[mine][:, None] + around] @ bits
    mine = mine[_simple_codes()[codes]]
    flat[pixels[mine]] ^= True
    flipped[mine] = True
  return flipped


@functools.cache
def _simple_codes() -> np.ndarray:
  """Whether a pixel is simple, bool [256], by its neighbours in raster order.

  Bit k is set where neighbour k is an object.
  """
  simple = np.zeros(256, bool)
  for code in range(256):
    objects = np.insert(code >> np.arange(8) & 1, 4, 0).reshape(3, 3)
    border = 1 - objects
    border[1, 1] = 0
    pieces, _ = ndimage.label(objects)
    touching = np.unique(pieces[[0, 1, 1, 2], [1, 0, 2, 1]])
    _, num_border = ndimage.label(border, np.ones((3, 3)))
    simple[code] = np.count_nonzero(touching) == 1 and num_border == 1
  return simple
