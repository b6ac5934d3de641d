"""Examples that know too much of one another: copies, twins and neighbours.

A network that was trained on one of them is not tested by the other. Three
kinds are found, from small fingerprints and not from the images:

  identical  the same pixels, whatever the files
  similar    the same picture, changed a little or one slice further on
  adjacent   two tiles that were cut from one picture, side by side
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image
from scipy import ndimage, special

# Sides of a thumbnail, and what it is smoothed by to keep neither grain nor
# illumination.
_THUMB, _FINE, _COARSE = 64, 1.0, 4.0
# Thumbnails that correlate so much are of one picture, whatever the others do.
_TWIN = 0.95
# And so much, if no chance pair of the set comes near: of consecutive slices.
_ALIKE, _FEWEST = 0.4, 28
# A smaller image says too little to know it by; one that is smaller than its
# thumbnail too little to be known by resemblance alone.
_LEAST_SIDE = 32
# Chance of a false alarm a set; and the least evidence and longest step from
# one tile to the next, in steps from line to line inside the tiles.
_CHANCE, _LEAST_Z, _STEP = 1e-3, 5.0, 1.5
# And the least evidence of the values themselves.
_LEAST_Z_VALUES = 4.0
# Of how many images all pairs are compared; more take minutes and gigabytes.
MOST_COMPARED = 8000
_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Fingerprint:
  """What is kept of an image to compare it.

  Attributes:
    content: digest of shape and pixels.
    thumb: grey float32 [64, 64], of the middle slice of a volume; None of a
      signal or of less than 32 pixels a side.
    is_large: it was not enlarged.
    borders: of pictures, for rows and for columns the first two and the last
      two lines, float32 [4, n]; else empty.
  """

  content: bytes
  thumb: np.ndarray | None
  is_large: bool
  borders: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two examples, by index; `score` is their correlation."""

  kind: str
  first: int
  second: int
  score: float


def fingerprint(image: np.ndarray) -> Fingerprint:
  """Of an image float32 [*S, C]."""
  digest = hashlib.sha256(str(image.shape).encode())
  digest.update(np.ascontiguousarray(image).data)
  grey, borders, thumb = image.mean(-1, dtype=np.float32), (), None
  if grey.ndim == 2 and min(grey.shape) > 3:
    borders = tuple(x[[0, 1, -2, -1]] for x in (grey, grey.T))
  while grey.ndim > 2:
    grey = grey[len(grey) // 2]
  if grey.ndim == 2 and min(grey.shape) >= _LEAST_SIDE:
    small = Image.fromarray(grey).resize((_THUMB,) * 2, Image.Resampling.BOX)
    thumb = np.asarray(small, np.float32)
  is_large = thumb is not None and min(grey.shape) >= _THUMB
  return Fingerprint(digest.digest(), thumb, is_large, borders)


def find_pairs(prints: Sequence[Fingerprint]) -> list[Pair]:
  """All pairs, each once, of its most telling kind.

  Only identical ones if there are more than MOST_COMPARED.
  """
  found: dict[tuple[int, int], Pair] = {}
  finders = [_identical]
  if len(prints) <= MOST_COMPARED:
    finders += [_similar, _adjacent]
  for find in finders:
    for pair in find(prints):
      ends = pair.first, pair.second
      contents = {prints[i].content for i in ends}
      if len(contents) > 1 or pair.kind == "identical":  # Copies are once.
        found.setdefault(ends, pair)
  return sorted(found.values(), key=lambda p: (p.first, p.second))


def group(count: int, pairs: Sequence[Pair]) -> list[list[int]]:
  """The indexes 0..count-1, those that pairs connect together."""
  parent = list(range(count))

  def root(i: int) -> int:
    while parent[i] != i:
      parent[i] = i = parent[parent[i]]
    return i

  for pair in pairs:
    a, b = root(pair.first), root(pair.second)
    parent[max(a, b)] = min(a, b)
  groups: dict[int, list[int]] = {}
  for i in range(count):
    groups.setdefault(root(i), []).append(i)
  return list(groups.values())


# --- The three kinds ----------------------------------------------------------


def _identical(prints: Sequence[Fingerprint]) -> Iterator[Pair]:
  """Each copy with the first of its kind."""
  first: dict[bytes, int] = {}
  for i, own in enumerate(prints):
    if (original := first.setdefault(own.content, i)) != i:
      yield Pair("identical", original, i, 1.0)


def _similar(prints: Sequence[Fingerprint]) -> Iterator[Pair]:
  """Thumbnails that correlate as no chance pair of the set does.

  Far more than the bulk of all pairs: sets of faces or of aligned volumes have
  much in common without one being a copy of another. Of the bulk's Fisher z the
  median and the spread (1.4826 times the median deviation) are taken. And far
  more than by chance, as in `_adjacent`: two blobs alike are no evidence.
  """
  has = [i for i, p in enumerate(prints) if p.thumb is not None]
  if len(has) < 2:
    return
  thumbs = np.stack([prints[i].thumb for i in has])
  fine = ndimage.gaussian_filter(thumbs, (0, _FINE, _FINE))
  fine -= ndimage.gaussian_filter(thumbs, (0, _COARSE, _COARSE))
  whole, power, fine = _unit(thumbs), _power(fine), _unit(fine)
  # The bulk, from at most a thousand of them.
  some = fine[:: -(-len(fine) // 1000)]
  chance = (some @ some.T)[np.triu_indices(len(some), 1)]
  large = np.array([prints[i].is_large for i in has])
  least, outlier = np.inf, -special.ndtri(_CHANCE / len(has) ** 2)
  if len(chance) >= _FEWEST:
    z = np.arctanh(np.clip(chance, -0.999, 0.999))
    middle = np.median(z)
    spread = 1.4826 * np.median(np.abs(z - middle))
    least = max(_ALIKE, np.tanh(middle + outlier * spread))
  for start in range(0, len(has), _ROWS):
    rows = slice(start, start + _ROWS)
    twin, alike = whole[rows] @ whole.T, fine[rows] @ fine.T
    alike_z = _evidence(alike, power[rows], power)
    hit = (alike >= least) & (alike_z > outlier) & large & large[rows, None]
    hit |= (twin >= _TWIN) & (alike >= _ALIKE)
    for a, b in np.argwhere(np.triu(hit, start + 1)):
      yield Pair("similar", has[start + a], has[b], float(alike[a, b]))


def _adjacent(prints: Sequence[Fingerprint]) -> Iterator[Pair]:
  """Tiles of which the last line of one and the first of the other fit.

  Two conditions. The step across the seam is no longer than those from line to
  line inside the tiles. And the changes along the two lines correlate beyond
  chance, as do the lines themselves: with correlation r over n pixels, Fisher's
  z = atanh(r) sqrt(m - 3) is standard normal for m independent pixels, and of
  lines with autocorrelations a and b there are m = n / sum_k a(k) b(k) of them.

  Reference: Bartlett 1935, https://doi.org/10.2307/2342284, equation for the
  variance of r (m); Fisher 1921, Metron 1 (z).
  """
  for axis in (0, 1):
    by_length: dict[int, list[int]] = {}
    for i, own in enumerate(prints):
      if own.borders:
        by_length.setdefault(own.borders[axis].shape[1], []).append(i)
    for length, members in by_length.items():
      lines = np.stack([prints[i].borders[axis] for i in members], 1)
      if length > 8 and len(members) > 1:
        for a, b, score in _seams(lines.astype(np.float64)):
          first, second = sorted((members[a], members[b]))
          yield Pair("adjacent", first, second, score)


def _seams(lines: np.ndarray) -> Iterator[tuple[int, int, float]]:
  """(a, b, r) where a's last line continues in b's first; lines [4, N, n]."""
  first, second, before, last = lines
  count = lines.shape[1]
  # Of values and of changes: blobs mislead the one, grain the other.
  views = [
    [_unit(x), _unit(y), _power(x), _power(y)]
    for x, y in ((last, first), (np.diff(last), np.diff(first)))
  ]
  inside = [np.square(x).sum(1) for x in (last - before, first - second)]
  lengths = [np.square(x).sum(1) for x in (last, first)]
  needed = max(_LEAST_Z, -special.ndtri(_CHANCE / (2 * count * count)))
  for start in range(0, count, _ROWS):
    rows = slice(start, start + _ROWS)
    every = [(x[rows] @ y.T, p[rows], q) for x, y, p, q in views]
    z_values, z = (_evidence(*view) for view in every)
    fits, r = z_values > _LEAST_Z_VALUES, every[1][0]
    step = lengths[0][rows, None] + lengths[1] - 2 * last[rows] @ first.T
    usual = (inside[0][rows, None] + inside[1]) / 2
    for a, b in np.argwhere(fits & (z > needed) & (step <= _STEP**2 * usual)):
      if start + a != b:  # A picture may fit itself: a pattern.
        yield start + a, b, float(r[a, b])


def _evidence(
  r: np.ndarray, powers: np.ndarray, others: np.ndarray
) -> np.ndarray:
  """Fisher's z of correlations [A, B], from the spectra [A, n] and [B, n]."""
  n = powers.shape[1]
  # The sum over lags of the product of autocorrelations, by Parseval.
  independent = n / np.maximum(powers @ others.T / n, 1)
  z = np.arctanh(np.clip(r, -1 + 1e-6, 1 - 1e-6))
  return z * np.sqrt(np.maximum(independent - 3, 0))


def _unit(rows: np.ndarray) -> np.ndarray:
  """Each row with mean 0 and length 1, flat; a constant one becomes 0."""
  rows = rows.reshape(len(rows), -1)
  rows = rows - rows.mean(1, keepdims=True)
  length = np.linalg.norm(rows, axis=1, keepdims=True)
  return np.divide(rows, length, out=np.zeros_like(rows), where=length > 1e-5)


def _power(rows: np.ndarray) -> np.ndarray:
  """Power spectrum of each row, less its mean; of any axes, flat, mean 1."""
  axes = tuple(range(1, rows.ndim))
  rows = rows - rows.mean(axes, keepdims=True)
  power = np.abs(np.fft.fftn(rows, axes=axes)) ** 2
  power = power.reshape(len(rows), -1).astype(rows.dtype)
  mean = power.mean(1, keepdims=True)
  return np.divide(power, mean, out=np.ones_like(power), where=mean > 0)
