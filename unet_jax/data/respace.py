"""Volumes brought to one voxel spacing as they are read, and back.

Old and new grid have one centre, and the new voxels exactly the spacing asked
for: voxel i of n along an axis is read at

  x = (m - 1) / 2 + (i - (n - 1) / 2) new / old,  n = max(round(m old / new), 1)

of m old voxels; what lies beyond the first or last is theirs. Images and
probabilities are interpolated linearly along each axis, ids are those of the
nearest voxel. Where voxels grow nothing is blurred before.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from unet_jax.data.source import Source
from unet_jax.errors import UserError

Spacing = Sequence[float]


def new_size(
  size: Sequence[int],
  old: Spacing,
  new: Spacing,
  *,
  max_pixels: int,
  path: pathlib.Path,
) -> tuple[int, ...]:
  """Voxels along each axis once they have the new spacing.

  Raises:
    UserError: that would be more than `max_pixels`; it names `path`.
  """
  sizes = zip(size, old, new, strict=True)
  found = tuple(max(round(m * a / b), 1) for m, a, b in sizes)
  if math.prod(found) > max_pixels:
    raise UserError(
      f"{path}: data.spacing={tuple(new)} makes {' x '.join(map(str, found))}"
      f" voxels of it, more than data.max_pixels={max_pixels}; raise one of the"
      " two"
    )
  return found


def resample(
  array: np.ndarray,
  old: Spacing,
  new: Spacing,
  size: Sequence[int],
  *,
  linear: bool,
) -> np.ndarray:
  """An array [*S, ...] on another grid.

  Args:
    array: float32 where `linear`, else ids of any dtype.
    old: spacing of its voxels along each axis.
    new: spacing of the result's.
    size: of the result: that of `new_size`, or on the way back the original.
    linear: interpolates; else takes the nearest voxel, of two the later.

  Returns:
    [*size, ...] of the same dtype.
  """
  for axis, (a, b, n) in enumerate(zip(old, new, size, strict=True)):
    m = array.shape[axis]
    x = (m - 1) / 2 + (np.arange(n) - (n - 1) / 2) * (b / a)
    if not linear:
      nearest = np.floor(x + 0.5).astype(int).clip(0, m - 1)
      array = array.take(nearest, axis)
      continue
    x = x.clip(0, m - 1)
    low = np.floor(x).astype(int)
    shape = [-1 if k == axis else 1 for k in range(array.ndim)]
    share = (x - low).astype(np.float32).reshape(shape)
    first = array.take(low, axis)
    second = array.take(np.minimum(low + 1, m - 1), axis)
    array = first + share * (second - first)
  return array


class Respaced:
  """A source whose volumes have one spacing, where theirs is known.

  Attributes:
    stored: the source as its files are.
  """

  def __init__(self, stored: Source, spacing: Spacing, max_pixels: int):
    self.stored, self.names = stored, stored.names
    self._spacing, self._max_pixels = tuple(spacing), max_pixels

  def __getattr__(self, name: str) -> Any:
    # What does not depend on the grid. Not while it is being copied.
    if name == "stored":
      raise AttributeError(name)
    return getattr(self.stored, name)

  def __len__(self) -> int:
    return len(self.stored)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return self._example(index, self.stored[index])

  def convert(
    self, index: int, image: np.ndarray, ids: np.ndarray
  ) -> dict[str, np.ndarray]:
    return self._example(index, self.stored.convert(index, image, ids))

  def image(self, index: int) -> np.ndarray:
    return self._resample(index, self.stored.image(index), linear=True)

  def instances(self, index: int) -> np.ndarray | None:
    ids = self.stored.instances(index)
    return ids if ids is None else self._resample(index, ids)

  def size(self, index: int) -> tuple[int, ...]:
    size, old = self.stored.size(index), self.stored.spacing(index)
    if old is None:
      return size
    limit = {"max_pixels": self._max_pixels, "path": self.path(index)}
    return new_size(size, old, self._spacing, **limit)

  def spacing(self, index: int) -> tuple[float, ...] | None:
    return self.stored.spacing(index) and self._spacing

  def check(self, index: int, *, read_label: bool) -> None:
    self.stored.check(index, read_label=read_label)
    self.size(index)

  def _example(
    self, index: int, example: dict[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    return {
      name: self._resample(index, array, linear=name == "image")
      for name, array in example.items()
    }

  def _resample(
    self, index: int, array: np.ndarray, *, linear: bool = False
  ) -> np.ndarray:
    old, size = self.stored.spacing(index), self.size(index)
    if old is None:
      return array
    return resample(array, old, self._spacing, size, linear=linear)
