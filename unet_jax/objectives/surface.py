"""Distances between the surfaces of two masks, in units of the voxel spacing.

A surface runs between the pixels: each corner that 2^D pixels share and that
are not all alike holds a surface element. Its size is that of the line or
polygon that cuts the edges between the pixel centres half-way (marching squares
and cubes); its place is the corner. Outside the image there is no object.

Masks are bool [*S] on one to three axes.

Reference: Nikolov et al. 2021, https://doi.org/10.2196/26151, whose published
program gives the same numbers; marching cubes: Lorensen & Cline 1987,
https://doi.org/10.1145/37401.37422.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import ndimage

_Point = tuple[float, ...]


def surface_scores(
  truth: np.ndarray,
  predicted: np.ndarray,
  counted: np.ndarray,
  *,
  spacing: Sequence[float],
  tolerance: float,
) -> tuple[float, float, float]:
  """How far two surfaces lie apart.

  Elements that touch a pixel which is not `counted` are no part of either
  surface. Two empty surfaces give NaN. If one alone is empty, the distances are
  the image's diagonal, more than any other (so that a class that is missed or
  invented costs something), and the Dice is 0.

  Args:
    truth: the true mask, bool [*S].
    predicted: the predicted mask, bool [*S].
    counted: False where a pixel counts nowhere, bool [*S].
    spacing: size of a pixel along each axis.
    tolerance: a distance up to which surfaces agree.

  Returns:
    hd95: the larger of the two 95th percentiles of the distance from an element
      to the other surface, weighted by size.
    asd: mean distance over the elements of both surfaces, weighted by size.
    nsd: share of both surfaces within `tolerance` of the other one, in [0, 1].
  """
  diagonal = float(np.linalg.norm(np.multiply(truth.shape, spacing)))
  window = ndimage.find_objects((truth | predicted).astype(np.uint8))
  if not window:
    return np.nan, np.nan, np.nan
  # One pixel more on each side, for what is counted there.
  window = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in window[0])
  outside = ~counted[window]
  sizes = [
    _element_sizes(mask[window], outside, tuple(map(float, spacing)))
    for mask in (truth, predicted)
  ]
  empty = [not size.any() for size in sizes]
  if any(empty):
    return (np.nan,) * 3 if all(empty) else (diagonal, diagonal, 0.0)
  distances, weights = [], []
  for mine, other in (sizes, sizes[::-1]):
    away = ndimage.distance_transform_edt(other == 0, sampling=spacing)
    distances.append(away[mine > 0])
    weights.append(mine[mine > 0])
  hd95 = max(map(_percentile_95, distances, weights))
  distance, weight = np.concatenate(distances), np.concatenate(weights)
  asd = (distance * weight).sum() / weight.sum()
  nsd = weight[distance <= tolerance].sum() / weight.sum()
  return float(hd95), float(asd), float(nsd)


def _percentile_95(distance: np.ndarray, weight: np.ndarray) -> float:
  order = np.argsort(distance, kind="stable")
  share = np.cumsum(weight[order]) / weight.sum()
  return distance[order[min(np.searchsorted(share, 0.95), len(order) - 1)]]


def _element_sizes(
  mask: np.ndarray, outside: np.ndarray, spacing: tuple[float, ...]
) -> np.ndarray:
  """Size of the surface element at each corner, float64 [*S + 1]; 0 = none."""
  mask, outside = np.pad(mask & ~outside, 1), np.pad(outside, 1)
  code = np.zeros([n - 1 for n in mask.shape], np.uint8)
  touched = np.zeros(code.shape, bool)
  for bit, corner in enumerate(_corners(mask.ndim)):
    window = tuple(
      slice(at, at + n) for at, n in zip(corner, code.shape, strict=True)
    )
    code |= mask[window].astype(np.uint8) << np.uint8(bit)
    touched |= outside[window]
  return np.where(touched, 0.0, _size_table(spacing)[code])


# --- The size of an element ---------------------------------------------------


def _corners(dims: int) -> list[tuple[int, ...]]:
  return list(itertools.product((0, 1), repeat=dims))


@functools.cache
def _size_table(spacing: tuple[float, ...]) -> np.ndarray:
  """Size of the element of each code: bit k is set if corner k is inside."""
  dims = len(spacing)
  corners = _corners(dims)
  sizes = np.zeros(2 ** len(corners))
  for code in range(len(sizes)):
    inside = {c for bit, c in enumerate(corners) if code >> bit & 1}
    if dims == 3 and len(inside) > 4:
      inside = set(corners) - inside  # Both sides have the same surface.
    if dims == 1:
      sizes[code] = len(inside) == 1
    elif dims == 2:
      segments = _segments(_ring((0, 1), {}), inside)
      sizes[code] = sum(
        np.linalg.norm(np.subtract(a, b) * spacing) for a, b in segments
      )
    else:
      sizes[code] = sum(
        _polygon_area(loop, np.array(spacing)) for loop in _loops(inside)
      )
  return sizes


def _ring(axes: tuple[int, int], fixed: dict[int, int]) -> list[_Point]:
  """The corners of a square, in turn."""
  ring = []
  for pair in ((0, 0), (0, 1), (1, 1), (1, 0)):
    at = fixed | dict(zip(axes, pair, strict=True))
    ring.append(tuple(at[axis] for axis in sorted(at)))
  return ring


def _segments(
  ring: list[_Point], inside: set[_Point]
) -> list[tuple[_Point, _Point]]:
  """The lines that part the inner corners of a square from the others.

  Two opposite inner corners are parted from each other too.
  """
  edges = list(zip(ring, ring[1:] + ring[:1], strict=True))
  middles = [tuple(np.add(a, b) / 2) for a, b in edges]
  cut = [i for i, (a, b) in enumerate(edges) if (a in inside) != (b in inside)]
  if len(cut) < 4:
    return [(middles[cut[0]], middles[cut[1]])] if cut else []
  return [(middles[i - 1], middles[i]) for i in range(4) if ring[i] in inside]


def _loops(inside: set[_Point]) -> Iterator[list[_Point]]:
  """The closed polygons around the inner corners of a cube."""
  beside: dict[_Point, list[_Point]] = {}
  for axis, side in itertools.product(range(3), (0, 1)):
    first, second = {0, 1, 2} - {axis}
    for a, b in _segments(_ring((first, second), {axis: side}), inside):
      beside.setdefault(a, []).append(b)
      beside.setdefault(b, []).append(a)
  while beside:
    point = next(iter(beside))
    loop = []
    while point in beside:
      loop.append(point)
      one, other = beside.pop(point)
      point = one if one in beside else other
    yield loop


def _polygon_area(loop: list[_Point], spacing: np.ndarray) -> float:
  """Area of a polygon in space, cut into triangles.

  Of all ways to cut, one that is largest in a unit cube: this gives the areas
  of the published table.
  """
  points = np.array(loop)

  def area(triangles: tuple, scale: np.ndarray) -> float:
    a, b, c = (
      points[list(ids)] * scale for ids in zip(*triangles, strict=True)
    )
    return np.linalg.norm(np.cross(b - a, c - a), axis=-1).sum() / 2

  ways = list(_triangulations(0, len(points) - 1))
  areas = np.round([area(way, np.ones(3)) for way in ways], 9)
  return area(ways[int(np.argmax(areas))], spacing)


def _triangulations(first: int, last: int) -> Iterator[tuple]:
  """Every way to cut the polygon of points first..last into triangles."""
  if last - first < 2:
    yield ()
  for middle in range(first + 1, last):
    for left in _triangulations(first, middle):
      for right in _triangulations(middle, last):
        yield (*left, (first, middle, last), *right)
