"""Strict decoding: a file becomes exactly the array it holds, or a UserError.

Nothing is guessed, resized, clipped or repaired here, since a mask that reads
"nearly right" trains a wrong network without a word.
"""

import contextlib
import math
import pathlib
import struct
import tokenize
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps

from unet_jax.errors import UserError

# Pillow's name of the one format that a suffix may hold.
_FORMATS = {
  ".png": "PNG",
  ".jpg": "JPEG",
  ".jpeg": "JPEG",
  ".tif": "TIFF",
  ".tiff": "TIFF",
  ".bmp": "BMP",
}
SUFFIXES = (*_FORMATS, ".npy")

# What Pillow and numpy raise on damaged files (found by fuzzing).
_DAMAGED = (
  OSError,
  EOFError,
  SyntaxError,
  ValueError,
  TypeError,
  LookupError,
  ArithmeticError,
  struct.error,
  tokenize.TokenError,
  zlib.error,
  MemoryError,
  Image.DecompressionBombError,
)
# Colour channels in front of alpha.
_NUM_COLOURS = {"LA": 1, "RGBA": 3}
_IMAGE_MODES = ("1", "L", "I;16", "I;16B", "I;16L", "F", "RGB", *_NUM_COLOURS)
_MASK_MODES = ("1", "L", "P", "I;16", "I;16B", "I;16L", "I", "RGB")
# Pillow spreads 2- and 4-bit greys over 0..255; ids are multiples of this.
_GREY_STEP = {"L;2": 85, "L;4": 17}
# Rec. 601 luma, https://www.itu.int/rec/R-REC-BT.601
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def read_image(
  path: pathlib.Path, *, channels: int, dims: int, max_pixels: int
) -> np.ndarray:
  """Decodes an image.

  Bits become 0 and 1, 8-bit values v / 255, 16-bit values v / 65535; floats
  stay as they are. Palettes are looked up, alpha is dropped, EXIF orientation
  is applied. Grey is repeated for `channels=3`; colour becomes grey for
  `channels=1` by 0.299 R + 0.587 G + 0.114 B, in float32.

  Args:
    path: a file with one of SUFFIXES; .npy holds [*S] or [*S, channels].
    channels: channels wanted.
    dims: spatial axes; other than 2 only in .npy.
    max_pixels: larger images are refused before they are decoded.

  Returns:
    float32 [*S, channels].

  Raises:
    UserError: the file is damaged, too large, or of another kind.
  """
  path = pathlib.Path(path)
  if _is_npy(path, dims):
    array = _read_npy(path, dims, max_pixels)
  else:
    picture, _ = _read_picture(path, max_pixels)
    if picture.mode in ("P", "PA"):
      picture = picture.convert("RGB")
    if picture.mode not in _IMAGE_MODES:
      raise UserError(
        f"{path}: images of mode {picture.mode} are not read; save it as grey"
        " or RGB"
      )
    array = np.asarray(picture)
    array = array[..., : _NUM_COLOURS.get(picture.mode)]
    array = array[..., 0] if picture.mode == "LA" else array
  return to_image(array, channels=channels, dims=dims, name=str(path))


def read_mask(path: pathlib.Path, *, dims: int, max_pixels: int) -> np.ndarray:
  """Decodes a mask to the ids that the file holds.

  A palette image gives its indexes, not its colours; RGB is read only where the
  three channels agree. EXIF orientation is applied, as to images.

  Args:
    path: a file with one of SUFFIXES, JPEG excepted; .npy holds [*S].
    dims: spatial axes; other than 2 only in .npy.
    max_pixels: larger masks are refused before they are decoded.

  Returns:
    int64 [*S].

  Raises:
    UserError: the file is damaged, too large, lossy, or holds no ids.
  """
  path = pathlib.Path(path)
  if _is_npy(path, dims):
    array = _read_npy(path, dims, max_pixels)
    if array.ndim != dims or array.dtype.kind not in "bui":
      raise UserError(
        f"{path}: a mask must be an integer array of {dims} axes, not"
        f" {array.dtype} of shape {array.shape}"
      )
    return array.astype(np.int64)
  if _FORMATS[path.suffix.lower()] == "JPEG":
    raise UserError(f"{path}: JPEG changes label ids; save masks as PNG")
  picture, grey_step = _read_picture(path, max_pixels)
  array = np.asarray(picture)
  if picture.mode not in _MASK_MODES or (
    array.ndim == 3 and (array != array[..., :1]).any()
  ):
    raise UserError(
      f"{path}: a mask of mode {picture.mode} holds colours, not class ids;"
      " save it as an 8-bit grey or palette image of ids"
    )
  array = array[..., 0] if array.ndim == 3 else array
  return array.astype(np.int64) // grey_step


def image_size(path: pathlib.Path, dims: int) -> tuple[int, ...]:
  """Spatial size that `read_image` or `read_mask` will give, from the header.

  Raises:
    UserError: the header cannot be read.
  """
  path = pathlib.Path(path)
  if _is_npy(path, dims):
    return _npy_header(path, dims).shape[:dims]
  with _open_picture(path) as picture:
    return _oriented_size(picture)


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Turns any complaint of a decoder into one that names the file."""
  try:
    yield
  except UserError:
    raise
  except _DAMAGED as error:
    kind = path.suffix.lower()[1:]
    reason = " ".join(str(error).replace(f"'{path}'", "").split())
    raise UserError(
      f"{path}: not a readable {kind} file ({reason or type(error).__name__});"
      " replace it or take it out"
    ) from error


def _is_npy(path: pathlib.Path, dims: int) -> bool:
  suffix = path.suffix.lower()
  if suffix not in SUFFIXES:
    raise UserError(
      f"{path}: unknown kind of file; give one of {', '.join(SUFFIXES)}"
    )
  if suffix != ".npy" and dims != 2:
    raise UserError(
      f"{path}: pictures have 2 axes but model.dims={dims}; give .npy files"
    )
  return suffix == ".npy"


def _check_size(
  size: tuple[int, ...], max_pixels: int, path: pathlib.Path
) -> None:
  if math.prod(size) > max_pixels:
    raise UserError(
      f"{path}: {' x '.join(map(str, size))} pixels are more than"
      f" data.max_pixels={max_pixels}; raise it or cut the image up"
    )


# --- npy ----------------------------------------------------------------------


def _npy_header(path: pathlib.Path, dims: int) -> np.memmap:
  """The file, mapped but not read: only shape and dtype are known."""
  with _naming(path):
    header = np.lib.format.open_memmap(path, mode="r")
  if header.ndim not in (dims, dims + 1) or header.size == 0:
    raise UserError(
      f"{path}: shape {header.shape} does not fit model.dims={dims}; save"
      f" {dims} axes, or {dims + 1} with the channels last"
    )
  return header


def _read_npy(path: pathlib.Path, dims: int, max_pixels: int) -> np.ndarray:
  # Every value counts, so that channels cannot hide a huge array.
  _check_size(_npy_header(path, dims).shape, max_pixels, path)
  with _naming(path):
    # Read, not mapped: a mapped file that shrinks would kill the process.
    return np.load(path, allow_pickle=False)


# --- Pillow -------------------------------------------------------------------


@contextlib.contextmanager
def _open_picture(path: pathlib.Path) -> Iterator[Image.Image]:
  """Reads the header; damage is reported with the file's name."""
  # By handle: given a name, Pillow (13.0) maps plain TIFF files and gets those
  # that are turned by their orientation wrong.
  with _naming(path), path.open("rb") as file:
    with Image.open(file, formats=[_FORMATS[path.suffix.lower()]]) as picture:
      yield picture


def _oriented_size(picture: Image.Image) -> tuple[int, int]:
  """Rows and columns once EXIF orientation is applied, from the header."""
  width, height = picture.size
  # Pillow has swapped a TIFF's size already. For the others the base class is
  # asked, because PngImageFile.getexif decodes the whole image.
  if picture.format != "TIFF":
    exif = Image.Image.getexif(picture)
    if exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
      return width, height
  return height, width


def _read_picture(
  path: pathlib.Path, max_pixels: int
) -> tuple[Image.Image, int]:
  """The decoded, upright picture and the step between neighbouring greys."""
  with _open_picture(path) as picture:
    size = _oriented_size(picture)
    _check_size(size, max_pixels, path)
    if getattr(picture, "n_frames", 1) > 1:
      raise UserError(
        f"{path}: holds {picture.n_frames} frames; save each as a file"
      )
    args = picture.tile[0].args
    grey_step = _GREY_STEP.get(args if isinstance(args, str) else args[0], 1)
    # Before exif_transpose: loading a TIFF turns it, and would do so again.
    picture.load()
    upright = ImageOps.exif_transpose(picture)
  if upright.size != size[::-1]:
    raise UserError(
      f"{path}: its EXIF orientation comes after the pixels; save it again"
      " without EXIF"
    )
  return upright, grey_step


# --- Values and channels ------------------------------------------------------


def to_image(
  array: np.ndarray, *, channels: int, dims: int, name: str
) -> np.ndarray:
  """An array in memory as `read_image` would give it from a file.

  Args:
    array: bool, uint8, uint16 or float, [*S] or [*S, c].
    channels: channels wanted.
    dims: spatial axes.
    name: what an error calls it.

  Returns:
    float32 [*S, channels].
  """
  if array.ndim == dims:
    array = array[..., None]
  if array.ndim != dims + 1:
    raise UserError(
      f"{name}: has shape {array.shape}; expected {dims} spatial axes, then"
      " channels"
    )
  return _to_channels(_to_float(array, name), channels, name)


def _to_float(array: np.ndarray, name: str) -> np.ndarray:
  kind, num_bytes = array.dtype.kind, array.dtype.itemsize
  if kind == "u" and num_bytes <= 2:
    return array.astype(np.float32) / np.float32(2 ** (8 * num_bytes) - 1)
  if kind in "bf":
    return array.astype(np.float32)
  raise UserError(
    f"{name}: {array.dtype} images have no known range; save uint8, uint16 or"
    " float32"
  )


def _to_channels(image: np.ndarray, channels: int, name: str) -> np.ndarray:
  """float32 [*S, c] -> [*S, channels]."""
  found = image.shape[-1]
  if found == channels:
    return image
  if (found, channels) == (1, 3):
    return np.repeat(image, 3, axis=-1)
  if (found, channels) == (3, 1):
    return (image @ _LUMA)[..., None]
  raise UserError(
    f"{name}: has {found} channels but data.channels={channels}; only grey and"
    " RGB are converted into each other"
  )
