"""TIFF in parts: windows of large images and of stacks, and tiles written.

The one door to tifffile, the extra `[tiff]`.
"""

import collections
import contextlib
import importlib.util
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from unet_jax.data import decode, windows
from unet_jax.errors import UserError

# Bytes of decoded tiles and strips that are kept for the next window.
_CACHE = 2**26
# Side of the tiles that are written, and of the pages from which on they are.
_TILE = 256


def is_here() -> bool:
  """Whether tifffile is installed."""
  return importlib.util.find_spec("tifffile") is not None


def num_pages(path: pathlib.Path) -> int:
  """Pages of a file; they must be of one shape and type.

  Raises:
    UserError: it cannot be read.
  """
  with _opened(path) as file:
    first, pages = file.pages[0], list(file.pages)
    if any((p.shape, p.dtype) != (first.shape, first.dtype) for p in pages):
      raise UserError(f"{path}: pages differ in size or type; save each alone")
    return len(pages)


def open_picture(
  path: pathlib.Path, *, channels: int, dims: int, page: int = 0
) -> windows.Picture:
  """An image of which only the tiles or strips of a window are decoded.

  With `dims=2` it is one page, with 3 the stack of all of them.

  Raises:
    UserError: damaged, no plain grey or RGB, or compressed in a way that needs
      the package imagecodecs.
  """
  count = num_pages(path)
  with _opened(path) as file:
    first = file.pages[page]
    _check(first, path)
    size = (first.imagelength, first.imagewidth)
  cache = _Segments(path)

  def read(window: windows.Window) -> np.ndarray:
    if dims == 2:
      array = cache.read(page, window)
    else:
      pages = range(*window[0])
      array = np.stack([cache.read(p, window[1:]) for p in pages])
    return decode.to_image(array, channels=channels, dims=dims, name=str(path))

  size = size if dims == 2 else (count, *size)
  return windows.Picture(size, read, suffix=".tif")


def write(
  path: pathlib.Path, bands: Iterator[np.ndarray], size: Sequence[int]
) -> None:
  """Writes rows [n, *rest] of an image or a volume, as they come, in tiles.

  A part of a file is never left at `path`.
  """
  import tifffile

  shape = tuple(size)
  big = math.prod(shape) > 2**31
  temp = path.with_name(f".{path.name}.tmp")
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    first = next(bands)
    with tifffile.TiffWriter(temp, bigtiff=big) as file:
      file.write(
        _tiles(first, bands, len(shape)),
        shape=shape,
        dtype=first.dtype,
        tile=(_TILE, _TILE),
        compression="zlib",
        photometric="minisblack",
        metadata=None,
      )
    temp.replace(path)
  finally:
    temp.unlink(missing_ok=True)


def _tiles(
  first: np.ndarray, bands: Iterator[np.ndarray], dims: int
) -> Iterator[np.ndarray]:
  """Square tiles, row by row, page by page; those at the end are smaller."""
  if dims == 3:
    yield from _row_tiles(first)
    for band in bands:
      yield from _row_tiles(band)
    return
  rows = first
  for band in bands:
    while len(rows) >= _TILE:
      yield from _row_tiles(rows[None, :_TILE])
      rows = rows[_TILE:]
    rows = np.concatenate([rows, band])
  yield from _row_tiles(rows[None])


def _row_tiles(pages: np.ndarray) -> Iterator[np.ndarray]:
  for page in pages:
    for row in range(0, page.shape[0], _TILE):
      for column in range(0, page.shape[1], _TILE):
        yield page[row : row + _TILE, column : column + _TILE]


class _Segments:
  """The tiles or strips of a file, decoded when asked for, the latest kept."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._kept: collections.OrderedDict = collections.OrderedDict()
    self._bytes = 0

  def read(self, page: int, window: windows.Window) -> np.ndarray:
    """A window of a page, [h, w] or [h, w, c]."""
    (top, bottom), (left, right) = window
    with _opened(self._path) as file:
      found = file.pages[page]
      height, width = found.chunks[:2]
      out = np.empty(
        (bottom - top, right - left, *found.shape[2:]), found.dtype
      )
      across = -(-found.imagewidth // width)
      for row in range(top // height, -(-bottom // height)):
        for column in range(left // width, -(-right // width)):
          part = self._segment(file, page, row * across + column)
          y, x = row * height, column * width
          to_rows = slice(max(y - top, 0), min(y + part.shape[0], bottom) - top)
          to_columns = slice(
            max(x - left, 0), min(x + part.shape[1], right) - left
          )
          out[to_rows, to_columns] = part[
            max(top - y, 0) : bottom - y, max(left - x, 0) : right - x
          ].reshape(out[to_rows, to_columns].shape)
    return out

  def _segment(self, file: Any, page: int, index: int) -> np.ndarray:
    key = (page, index)
    if key in self._kept:
      self._kept.move_to_end(key)
      return self._kept[key]
    found, handle = file.pages[page], file.filehandle
    handle.seek(found.dataoffsets[index])
    data = handle.read(found.databytecounts[index])
    segment, _, shape = found.decode(data, index)
    if segment is None:  # A tile that was left out is all background.
      segment = np.full(shape, found.nodata, found.dtype)
    segment = segment[0][: shape[1], : shape[2]]
    self._kept[key] = segment
    self._bytes += segment.nbytes
    while self._bytes > _CACHE and len(self._kept) > 1:
      self._bytes -= self._kept.popitem(last=False)[1].nbytes
    return segment


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
  """The file, and any complaint of tifffile's as one of the file."""
  if not is_here():
    raise UserError(
      f"{path}: stacks and large TIFF files need tifffile; pip install"
      " unet_jax[tiff]"
    )
  import tifffile

  with decode.naming(path), tifffile.TiffFile(path) as file:
    yield file


def _check(page: Any, path: pathlib.Path) -> None:
  orientation = page.tags.get("Orientation")
  plain = (
    page.photometric in (1, 2)  # Black is 0; RGB.
    and page.planarconfig == 1
    and (orientation is None or orientation.value == 1)
    and page.imagedepth == 1
    and len(page.shape) <= 3
  )
  if not plain:
    raise UserError(
      f"{path}: only grey and interleaved, upright RGB TIFF files are read in"
      " parts; save it as one"
    )
