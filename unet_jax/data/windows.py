"""Images that are read window by window, so that none need fit in memory.

A window is a start and a stop for every spatial axis. Values are those that
`decode.read_image` gives: float32 [*S, C].
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from unet_jax.data import decode

# Pixels that are read at once when a whole image is gone through.
_PART = 2**22

Window = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Picture:
  """An image of any size.

  Attributes:
    size: of its spatial axes.
    read: gives a window that lies inside, float32 [*S, C].
    array: all of it, where it is in memory.
    suffix: of the file that is read in parts: ".tif" or ".npy".
    source: the file of a NIfTI volume.
  """

  size: tuple[int, ...]
  read: Callable[[Window], np.ndarray]
  array: np.ndarray | None = None
  suffix: str = ""
  source: pathlib.Path | None = None


def of_array(array: np.ndarray) -> Picture:
  """An image [*S, C] that is in memory."""

  def read(window: Window) -> np.ndarray:
    return array[tuple(slice(*w) for w in window)]

  return Picture(array.shape[:-1], read, array)


def in_memory(picture: Picture) -> Picture:
  """The same image, read now."""
  return of_array(picture.read([(0, n) for n in picture.size]))


def of_npy(path: pathlib.Path, *, channels: int, dims: int) -> Picture:
  """An image in an .npy file on a local disk, of which only windows are read.

  By reading and not by mapping: a mapped file that shrinks kills the process,
  and what was mapped counts as memory.
  """
  header = decode.npy_header(path, dims)
  shape, dtype, offset = header.shape, header.dtype, header.offset
  if not header.flags.c_contiguous:
    return of_array(
      decode.to_image(
        np.array(header), channels=channels, dims=dims, name=str(path)
      )
    )
  row = math.prod(shape[1:])

  def read(window: Window) -> np.ndarray:
    rest = tuple(slice(*w) for w in window[1:])
    rows = []
    with path.open("rb") as file:
      for i in range(*window[0]):
        file.seek(offset + i * row * dtype.itemsize)
        data = file.read(row * dtype.itemsize)
        rows.append(np.frombuffer(data, dtype).reshape(shape[1:])[rest].copy())
    return decode.to_image(
      np.stack(rows), channels=channels, dims=dims, name=str(path)
    )

  return Picture(shape[:dims], read, suffix=".npy")


def read_mirrored(
  picture: Picture, starts: Sequence[int], sizes: Sequence[int]
) -> np.ndarray:
  """The window [start, start + size) of each axis, mirrored beyond the borders.

  Pixel for pixel what `pipeline.pad_for_network` puts there.
  """
  indexes = [
    mirrored_index(n, start, size)
    for n, start, size in zip(picture.size, starts, sizes, strict=True)
  ]
  window = [(int(index.min()), int(index.max()) + 1) for index in indexes]
  array = picture.read(window)
  for axis, (index, (low, _)) in enumerate(zip(indexes, window, strict=True)):
    array = array.take(index - low, axis)
  return array


def mirrored_index(n: int, start: int, size: int) -> np.ndarray:
  """Which of n pixels lie at start, start + 1, ...; int64 [size].

  Mirrored about the first and last one, back and forth as long as it takes; one
  alone is repeated.
  """
  # A triangle wave: 0 1 2 1 0 1 ... for n = 3.
  index = np.arange(start, start + size) % max(2 * (n - 1), 1)
  return n - 1 - abs(index - (n - 1))


def parts(picture: Picture) -> Iterator[np.ndarray]:
  """All pixels of an image, once: whole if it is in memory, else in bands."""
  if picture.array is not None:
    yield picture.array
    return
  rest = [(0, n) for n in picture.size[1:]]
  rows = max(_PART // math.prod(picture.size[1:]), 1)
  for start in range(0, picture.size[0], rows):
    stop = min(start + rows, picture.size[0])
    yield picture.read([(start, stop), *rest])


# --- Views --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class View:
  """An image with its axes permuted, and then some of them reversed."""

  axes: tuple[int, ...]
  flips: tuple[bool, ...]

  def window(self, window: Window, size: Sequence[int]) -> list:
    """Where a window of the image, whose size is given, lies in the view."""
    return [
      (size[a] - window[a][1], size[a] - window[a][0]) if flip else window[a]
      for a, flip in zip(self.axes, self.flips, strict=True)
    ]

  def of(self, picture: Picture) -> Picture:
    """The view of an image."""
    inverse = [self.axes.index(a) for a in range(len(self.axes))]
    size = tuple(picture.size[a] for a in self.axes)

    def read(window: Window) -> np.ndarray:
      turned = [
        (n - stop, n - start) if flip else (start, stop)
        for (start, stop), n, flip in zip(window, size, self.flips, strict=True)
      ]
      array = picture.read([turned[i] for i in inverse])
      array = array.transpose(*self.axes, array.ndim - 1)
      return np.flip(array, tuple(np.flatnonzero(self.flips)))

    return Picture(size, read)

  def undo(self, array: np.ndarray, first: int = 0) -> np.ndarray:
    """Brings an array of the view back; its spatial axes begin at `first`."""
    array = np.flip(array, tuple(first + np.flatnonzero(self.flips)))
    order = list(range(array.ndim))
    for i, a in enumerate(self.axes):
      order[first + a] = first + i
    return array.transpose(order)


def all_views(dims: int, count: int) -> list[View]:
  """The image alone (`count` = 1), or all flips and turns that there are.

  Eight in 2D; in 3D the eight mirrors, whose axes often differ in spacing; two
  in 1D.
  """
  same = tuple(range(dims))
  if count == 1:
    return [View(same, (False,) * dims)]
  orders = [same, (1, 0)] if dims == 2 else [same]
  flips = list(itertools.product((False, True), repeat=dims))
  return [View(order, flip) for order in orders for flip in flips]
