"""What is predicted: files, folders, patterns and splits, each with a name."""

import collections
import contextlib
import dataclasses
import functools
import glob
import math
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.data import decode, nifti, pipeline, tiff, windows
from unet_jax.errors import UserError
from unet_jax.runtime import storage

# An image's name in the output, and the function that reads it.
Named = tuple[str, Callable[[], windows.Picture]]


def list_images(
  cfg: Config, workdir: pathlib.Path, input_path: pathlib.Path | None
) -> list[Named]:
  """Everything to predict, by the name of its results.

  Args:
    cfg: the run's config.
    workdir: folder of the training run, where a split may lie.
    input_path: an image, a folder of images, or a glob pattern of them; the
      pages of a TIFF are images in 2D. None takes `cfg.eval.split`.

  Raises:
    UserError: there is none, or two would be written to the same files.
  """
  images: list[Named] = []
  if input_path is None:
    splits = workdir_lib.split_dir(workdir)
    source = pipeline.make_source(cfg, cfg.eval.split, splits)
    source = getattr(source, "stored", source)  # Each on its own grid.
    for i, name in enumerate(source.names):
      read = lambda i=i: _of_file(source.image(i), source.path(i))
      images.append((name, read))
  else:
    for name, path in _named_files(input_path):
      pages = _num_pages(cfg, path)
      for page in range(pages):
        own = f"{name}_{page:0{len(str(pages - 1))}d}" if pages > 1 else name
        images.append((own, functools.partial(_read, cfg, path, page, pages)))
    _check_names([name for name, _ in images], input_path)
  return images[: cfg.predict.max_images or None]


def _num_pages(cfg: Config, path: pathlib.Path) -> int:
  """Images in a file; a damaged one has one, which then cannot be read."""
  is_tiff = path.suffix.lower() in (".tif", ".tiff")
  if cfg.model.dims != 2 or not is_tiff or not tiff.is_here():
    return 1
  try:
    return tiff.num_pages(path)
  except UserError:
    return 1


def _read(
  cfg: Config, path: pathlib.Path, page: int = 0, pages: int = 1
) -> windows.Picture:
  """A file as an image; a large TIFF or .npy, or a stack, in parts."""
  dims, how = cfg.model.dims, {"channels": cfg.data.channels}
  suffix, here = path.suffix.lower(), not storage.is_remote(path)
  is_tiff = suffix in (".tif", ".tiff") and here
  if is_tiff and (dims == 3 or pages > 1):
    picture = tiff.open_picture(path, dims=dims, page=page, **how)
    small = math.prod(picture.size) <= cfg.predict.whole_pixels
    together = pages > 1 or (small and cfg.predict.instances)
    return windows.in_memory(picture) if together else picture
  if is_tiff and tiff.is_here():
    with contextlib.suppress(UserError):  # Of another kind: as a whole.
      picture = tiff.open_picture(path, dims=dims, **how)
      if math.prod(picture.size) > cfg.predict.whole_pixels:
        return picture
  if here and suffix == ".npy":
    size = decode.image_size(path, dims)
    if math.prod(size) > cfg.predict.whole_pixels:
      return windows.of_npy(path, dims=dims, **how)
  image = decode.read_image(
    path, dims=dims, max_pixels=cfg.data.max_pixels, **how
  )
  return _of_file(image, path)


def _of_file(image: np.ndarray, path: pathlib.Path | None) -> windows.Picture:
  """An image in memory; a NIfTI volume keeps its path, for the header."""
  is_nifti = path is not None and decode.suffix_of(path) in nifti.SUFFIXES
  picture = windows.of_array(image)
  return dataclasses.replace(picture, source=path) if is_nifti else picture


def _named_files(path: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
  """Files with their output names: the stem, or the file name where it clashes.

  Where file names clash too, as in several folders, the path with `__` for `/`.

  Raises:
    UserError: there is no such path, or no image in it.
  """
  if path.is_dir():
    files = sorted(filter(_is_image, path.iterdir()))
  elif path.is_file():
    files = [path]
  elif glob.has_magic(str(path)) and not storage.is_remote(path):
    found = map(pathlib.Path, glob.glob(str(path), recursive=True))
    files = sorted(filter(_is_image, found))
  else:
    raise UserError(
      f"--input {path} does not exist; give an image, a folder, or a pattern"
      " such as 'DIR/*.png'"
    )
  if not files:
    raise UserError(
      f"--input {path} holds no image; supported: {', '.join(decode.SUFFIXES)}"
    )
  stems = [decode.stem_of(p) for p in files]
  counts = collections.Counter(stems)
  pairs = zip(files, stems, strict=True)
  names = [stem if counts[stem] == 1 else p.name for p, stem in pairs]
  if len(set(names)) < len(names):  # One file's stem is another's whole name.
    names = [p.name for p in files]
  if len(set(names)) < len(names):
    root = os.path.commonpath([p.parent for p in files])
    names = ["__".join(p.relative_to(root).parts) for p in files]
  return list(zip(names, files, strict=True))


def _is_image(path: pathlib.Path) -> bool:
  return decode.suffix_of(path) in decode.SUFFIXES and path.name[0] != "."


def _check_names(names: Sequence[str], input_path: pathlib.Path) -> None:
  """No image may overwrite another's results, also where case is ignored."""
  first: dict[str, str] = {}
  for name in names:
    other = first.setdefault(name.casefold(), name)
    if other is not name:
      raise UserError(
        f"--input {input_path}: {other!r} and {name!r} would be written to the"
        " same files; rename one, or predict them apart"
      )
