"""Regions of a mask: instances, and their outlines as GeoJSON."""

import json

import numpy as np
from scipy import ndimage

from unet_jax.errors import UserError

# Steps (x, y) of the four directions, each a right turn (y points down) from
# the one before: along the upper, right, lower and left side of a pixel.
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def instances(mask: np.ndarray) -> np.ndarray:
  """Numbers the regions of each class 1, 2, ..., int32; background is 0.

  A region's pixels share a class and sides; corners do not join them.
  """
  out, total = np.zeros(mask.shape, np.int32), 0
  for k in np.unique(mask[mask > 0]):
    found, count = ndimage.label(mask == k)
    out += np.where(found > 0, found + total, 0).astype(np.int32)
    total += count
  return out


def as_uint16(numbered: np.ndarray, name: str) -> np.ndarray:
  """Instances as a 16-bit image holds them."""
  if numbered.max(initial=0) > 65535:
    raise UserError(
      f"{name}: {numbered.max()} regions are more than 16 bits can number; set"
      " config.predict.instances=false"
    )
  return numbered.astype(np.uint16)


def geojson(mask: np.ndarray, numbered: np.ndarray) -> bytes:
  """The regions of a mask [H, W] as a FeatureCollection, UTF-8.

  A Polygon each, with `id`, `class` and `pixels` as properties. Coordinates are
  (x, y) of corners of pixels, (0, 0) the upper left one of the first; the first
  ring is the outline, others are holes. Filled again, they are the mask.

  Reference: RFC 7946.
  """
  sizes = np.bincount(numbered.ravel())
  features = []
  for number, rings in sorted(outlines(numbered).items()):
    x, y = rings[0][0]  # The upper left corner of a pixel inside.
    properties = {
      "id": number,
      "class": int(mask[y, x]),
      "pixels": int(sizes[number]),
    }
    geometry = {"type": "Polygon", "coordinates": rings}
    features.append(
      {"type": "Feature", "properties": properties, "geometry": geometry}
    )
  text = json.dumps({"type": "FeatureCollection", "features": features})
  return text.encode()


def outlines(numbered: np.ndarray) -> dict[int, list[list[list[int]]]]:
  """Closed rings of corners [x, y] of each region, the outer one first.

  Sides of pixels between two regions are walked with the region on the right.
  Where two of its pixels touch at a corner alone, the walk stays with its own.
  """
  sides = _sides(numbered)
  rings: dict[int, list] = {}
  for key in list(sides):
    while sides.get(key):
      ring = _walk(sides, key)
      number = key[0]
      is_outer = _area(ring) > 0
      rings.setdefault(number, []).insert(
        0 if is_outer else len(rings.get(number, ())), ring
      )
  return rings


def _sides(numbered: np.ndarray) -> dict[tuple[int, int, int], list[int]]:
  """Directions of the sides that begin at (region, x, y)."""
  wide = np.pad(numbered, 1)
  inner = wide[1:-1, 1:-1]
  # The neighbour across each side, and where the side begins in the pixel.
  across = (wide[:-2, 1:-1], wide[1:-1, 2:], wide[2:, 1:-1], wide[1:-1, :-2])
  begins = ((0, 0), (1, 0), (1, 1), (0, 1))
  sides: dict[tuple[int, int, int], list[int]] = {}
  for direction, (other, (dx, dy)) in enumerate(
    zip(across, begins, strict=True)
  ):
    ys, xs = np.nonzero((inner > 0) & (inner != other))
    found = zip(
      inner[ys, xs].tolist(),
      (xs + dx).tolist(),
      (ys + dy).tolist(),
      strict=True,
    )
    for key in found:
      sides.setdefault(key, []).append(direction)
  return sides


def _walk(
  sides: dict[tuple[int, int, int], list[int]], key: tuple[int, int, int]
) -> list[list[int]]:
  """Takes one ring out of `sides`: its corners, the first one again last."""
  number, x, y = key
  first = direction = min(sides[key])
  ring = [[x, y]]
  while True:
    sides[number, x, y].remove(direction)
    step = _STEPS[direction]
    x, y = x + step[0], y + step[1]
    if (x, y) == tuple(ring[0]):
      go_on = sides[number, x, y]
      right = (direction + 1) % 4
      if first == right or right not in go_on:
        break
    options = sides[number, x, y]
    turned = [d % 4 for d in (direction + 1, direction, direction + 3)]
    following = next(d for d in turned if d in options)
    if following != direction:
      ring.append([x, y])
    direction = following
  ring.append(ring[0])
  return ring


def _area(ring: list[list[int]]) -> int:
  """Twice the signed area: above 0 for an outline, below for a hole."""
  x, y = np.array(ring).T
  return int((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())
