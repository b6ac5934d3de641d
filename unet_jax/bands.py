"""Predictions of images that are never whole in memory, written as they come.

Masks, probabilities and uncertainty go to disk row by row. The pictures that
people look at, overlay and uncertainty, are made smaller while the rows pass.
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from unet_jax import outputs
from unet_jax.config import Config
from unet_jax.data import tiff, windows
from unet_jax.errors import UserError
from unet_jax.inspect import pictures
from unet_jax.runtime import storage
from unet_jax.tiles import Band

# Pixels: no side of a picture is longer.
MOST = 2048


def write(
  cfg: Config,
  output: pathlib.Path,
  name: str,
  picture: windows.Picture,
  bands: Iterator[Band],
) -> dict[str, Any]:
  """Writes a prediction and gives its `outputs.row`.

  The mask becomes NAME_mask with the input's suffix, tiled TIFF or .npy;
  probabilities and uncertainty .npy files. NAME_overlay.png, of a volume its
  middle slices, and NAME_uncertainty.png are those of an image in memory, made
  smaller by a whole number where a side has more than `MOST` pixels.

  Raises:
    UserError: the output is no local folder.
  """
  if storage.is_remote(output):
    raise UserError(
      f"--output {output}: images that are written in parts need a local disk"
    )
  output.mkdir(parents=True, exist_ok=True)
  drawing, rows = _Drawing(cfg, picture), []
  files: dict[str, _NpyRows] = {}

  def masks() -> Iterator[np.ndarray]:
    for band in bands:
      unsure = None
      if cfg.predict.uncertainty != "none":
        unsure = outputs.uncertainty_map(cfg, band.samples)
        put("uncertainty", unsure.astype(np.float32))
      if cfg.predict.probability:
        put("probability", band.samples.mean(0))
      drawing.add(band.mask, unsure)
      rows.append(outputs.row(cfg, name, band.mask, unsure))
      yield outputs.mask_values(cfg, band.mask)

  def put(kind: str, values: np.ndarray) -> None:
    if kind not in files:
      shape = (*picture.size, *values.shape[len(picture.size) :])
      files[kind] = _NpyRows(output / f"{name}_{kind}.npy", shape)
    files[kind].write(values)

  try:
    if picture.suffix == ".tif":
      tiff.write(output / f"{name}_mask.tif", masks(), picture.size)
    else:
      for values in masks():
        put("mask", values)
    for file in files.values():
      file.keep()
  finally:
    for file in files.values():
      file.close()
  row = outputs.merge(rows)
  for kind, drawn in drawing.finish(row).items():
    pictures.save_png(output / f"{name}_{kind}.png", drawn)
  return row


# --- Pictures -----------------------------------------------------------------


class _Cut(NamedTuple):
  """What is drawn of an image: all of it, or a slice across an axis."""

  window: list[tuple[int, int]]
  axis: int | None

  def flat(self, rows: tuple[int, int]) -> tuple[int, ...]:
    """Pixels a side of the drawing for these rows of the window."""
    window = [rows, *self.window[1:]]
    return tuple(b - a for i, (a, b) in enumerate(window) if i != self.axis)


def _cuts(size: Sequence[int]) -> list[_Cut]:
  """An image, the middle slices of a volume, nothing of a signal."""
  whole = [(0, n) for n in size]
  if len(size) < 3:
    return [_Cut(whole, None)] * (len(size) - 1)
  middle = [(n // 2, n // 2 + 1) for n in size]
  return [
    _Cut([*whole[:axis], middle[axis], *whole[axis + 1 :]], axis)
    for axis in range(len(size))
  ]


class _Drawing:
  """Overlay and uncertainty of an image whose rows come in order."""

  def __init__(self, cfg: Config, picture: windows.Picture):
    self._cfg, self._picture, self._row = cfg, picture, 0
    self._cuts = _cuts(picture.size)
    sizes = [cut.flat(cut.window[0]) for cut in self._cuts]
    self._images = [Shrunk(size) for size in sizes]
    self._masks = [Shrunk(size, ids=True) for size in sizes]
    has_map = len(sizes) == 1 and cfg.predict.uncertainty != "none"
    self._unsure = Shrunk(sizes[0]) if has_map else None

  def add(self, mask: np.ndarray, unsure: np.ndarray | None) -> None:
    """The next rows: class ids [n, *rest] and, if asked, their uncertainty."""
    first, self._row = self._row, self._row + len(mask)
    for i, cut in enumerate(self._cuts):
      (start, stop), *rest = cut.window
      start, stop = max(start, first), min(stop, self._row)
      if start >= stop:
        continue
      shape = cut.flat((start, stop))
      image = self._picture.read([(start, stop), *rest])
      self._images[i].add(image.reshape(*shape, -1))
      own = slice(start - first, stop - first), *(slice(*w) for w in rest)
      self._masks[i].add(mask[own].reshape(shape))
    if self._unsure is not None:
      self._unsure.add(unsure)

  def finish(self, row: dict[str, Any]) -> dict[str, np.ndarray]:
    """The pictures by the end of their file's name; `row` is the image's."""
    pairs = [
      (image.finish(), mask.finish())
      for image, mask in zip(self._images, self._masks, strict=True)
    ]
    drawn, labels = {}, self._cfg.num_labels
    if len(pairs) == 1:
      drawn["overlay"] = pictures.overlay(*pairs[0], num_labels=labels)
    elif pairs:
      size = self._picture.size
      drawn["overlay"] = pictures.draw_slices(pairs, size, num_labels=labels)
    if self._unsure is not None:
      # Of mutual information the highest before it was made smaller.
      drawn["uncertainty"] = outputs.uncertainty_picture(
        self._cfg, self._unsure.finish(), row["uncertainty_highest"]
      )
    return drawn


class Shrunk:
  """A picture [H, W, ...] whose rows come in order, made so small that it fits.

  A pixel is the mean of a square of pixels, or with `ids`, which have no mean,
  the one in its middle. What fits as it is stays as it is, to the bit.
  """

  def __init__(self, size: Sequence[int], *, ids: bool = False):
    self._size, self._ids, self._row = size, ids, 0
    self._factor = -(-max(size) // MOST)
    self._parts: list[np.ndarray] = []
    self._sums: np.ndarray | None = None

  def add(self, rows: np.ndarray) -> None:
    """The next rows [n, W, ...]."""
    f, (height, width) = self._factor, self._size
    at = self._row + np.arange(len(rows))
    self._row += len(rows)
    if self._ids:
      kept = rows[np.isin(at, _middles(height, f))]
      self._parts.append(kept[:, _middles(width, f)])
      return
    if self._sums is None:
      shape = (-(-height // f), -(-width // f), *rows.shape[2:])
      self._sums = np.zeros(shape, rows.dtype)
    sums = np.add.reduceat(rows, np.arange(0, width, f), axis=1)
    np.add.at(self._sums, at // f, sums)

  def finish(self) -> np.ndarray:
    """The picture, no side longer than `MOST`."""
    if self._ids:
      return np.concatenate(self._parts)
    height, width = (
      np.minimum(self._factor, n - np.arange(0, n, self._factor))
      for n in self._size
    )
    counts = np.multiply.outer(height, width).astype(self._sums.dtype)
    return self._sums / counts.reshape(
      *counts.shape, *(1,) * (self._sums.ndim - 2)
    )


def _middles(n: int, factor: int) -> np.ndarray:
  """The pixel in the middle of each stretch of an axis."""
  return np.minimum(np.arange(0, n, factor) + factor // 2, n - 1)


# --- Files --------------------------------------------------------------------


class _NpyRows:
  """An .npy file that grows by rows, and has its name once it is whole."""

  def __init__(self, path: pathlib.Path, shape: tuple[int, ...]):
    self._path, self._shape = path, shape
    self._temp = path.with_name(f".{path.name}.tmp")
    self._file = None

  def write(self, rows: np.ndarray) -> None:
    """Appends rows [n, *rest]."""
    if self._file is None:
      self._file = open(self._temp, "wb")
      header = {
        "descr": np.lib.format.dtype_to_descr(rows.dtype),
        "fortran_order": False,
        "shape": self._shape,
      }
      np.lib.format.write_array_header_1_0(self._file, header)
    self._file.write(np.ascontiguousarray(rows).data)

  def keep(self) -> None:
    """All rows are written."""
    self._file.close()
    self._temp.replace(self._path)

  def close(self) -> None:
    """Leaves no part of a file."""
    if self._file is not None:
      self._file.close()
    self._temp.unlink(missing_ok=True)
