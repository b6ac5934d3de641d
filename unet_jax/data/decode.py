"""Strict decoding: a file becomes exactly the array it holds, or a UserError.

Nothing is guessed, resized, clipped or repaired here, since a mask that reads
"nearly right" trains a wrong network without a word.

Throughout, `path` has one of SUFFIXES and `dims` counts spatial axes *S, which
are three in NIfTI files and two in all others but .npy; `InMemory` may stand
for it. Files of more than `max_pixels` are refused before they are decoded.
EXIF orientation is applied, and that of NIfTI headers, to images and masks
alike.
"""

import contextlib
import io
import math
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps

from unet_jax.data import nifti
from unet_jax.errors import UserError
from unet_jax.runtime import storage

# Pillow's name of the one format that a suffix may hold.
_FORMATS = {
  ".png": "PNG",
  ".jpg": "JPEG",
  ".jpeg": "JPEG",
  ".tif": "TIFF",
  ".tiff": "TIFF",
  ".bmp": "BMP",
}
SUFFIXES = (*_FORMATS, ".npy", *nifti.SUFFIXES)

# What an image in memory starts with.
_MAGIC = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg"}
# What images become first: palettes are looked up, alpha is dropped.
_PLAIN_MODES = {"P": "RGB", "PA": "RGB", "RGBA": "RGB", "LA": "L"}
_IMAGE_MODES = ("1", "L", "I;16", "I;16B", "I;16L", "F", "RGB")
_MASK_MODES = ("1", "L", "P", "I;16", "I;16B", "I;16L", "I", "RGB")
# Pillow spreads 2- and 4-bit greys over 0..255; ids are multiples of this.
_GREY_STEP = {"L;2": 85, "L;4": 17}
# Rec. 601 luma, https://www.itu.int/rec/R-REC-BT.601
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def suffix_of(path: pathlib.PurePath) -> str:
  """What says how a file is read: ".png", and ".nii.gz" as a whole."""
  packed = str(path).lower().endswith(".nii.gz")
  return ".nii.gz" if packed else path.suffix.lower()


def stem_of(path: pathlib.PurePath) -> str:
  """The file's name without `suffix_of` it."""
  return path.name[: len(path.name) - len(suffix_of(path))]


class InMemory:
  """What a file of any name holds, in the place of its path.

  Raises:
    UserError: it is neither PNG nor JPEG.
  """

  def __init__(self, name: str, data: bytes):
    self._name, self._data = name, data
    for magic, suffix in _MAGIC.items():
      if data.startswith(magic):
        self.suffix = suffix
        return
    raise UserError(f"{name}: neither PNG nor JPEG; prepare the set anew")

  def __str__(self) -> str:
    return self._name

  def open(self, mode: str) -> io.BytesIO:
    del mode
    return io.BytesIO(self._data)


def read_image(
  path: pathlib.Path, *, channels: int | None, dims: int, max_pixels: int
) -> np.ndarray:
  """Decodes an image to float32 [*S, channels]; .npy holds [*S] or [*S, c].

  `channels=None` keeps those of the file.

  Bits become 0 and 1, 8-bit values v / 255, 16-bit values v / 65535; floats
  stay as they are, and so does all that NIfTI files hold, in their own units.
  Palettes are looked up, alpha is dropped. Grey is repeated for `channels=3`;
  colour becomes grey for `channels=1` by 0.299 R + 0.587 G + 0.114 B, in
  float32.

  Raises:
    UserError: the file is damaged, too large, or of another kind.
  """
  kind = _kind(path, dims)
  if kind == "nifti":
    array = nifti.read_voxels(path, max_pixels)
    if array.dtype.kind != "f":  # These are not spread over 0..1.
      array = array.astype(np.float32)
  elif kind == "npy":
    array = _read_npy(path, dims, max_pixels)
  else:
    picture, _ = _read_picture(path, max_pixels)
    if picture.mode in _PLAIN_MODES:
      picture = picture.convert(_PLAIN_MODES[picture.mode])
    if picture.mode not in _IMAGE_MODES:
      raise UserError(
        f"{path}: images of mode {picture.mode} are not read; save it as grey"
        " or RGB"
      )
    array = np.asarray(picture)
  return to_image(array, channels=channels, dims=dims, name=str(path))


def read_mask(path: pathlib.Path, *, dims: int, max_pixels: int) -> np.ndarray:
  """Decodes a mask to the ids that the file holds, int64 [*S].

  A palette image gives its indexes, not its colours; RGB is read only where the
  three channels agree, floats of NIfTI files only where all are whole numbers.

  Raises:
    UserError: the file is damaged, too large, lossy, or holds no ids.
  """
  kind = _kind(path, dims)
  if kind == "nifti":
    return _to_ids(nifti.read_voxels(path, max_pixels), path)
  if kind == "npy":
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
  kind = _kind(path, dims)
  if kind == "nifti":
    return nifti.read_grid(path).size
  if kind == "npy":
    return npy_header(path, dims).shape[:dims]
  with _open_picture(path) as picture:
    return _oriented_size(picture)


def spacing(path: pathlib.Path) -> tuple[float, ...] | None:
  """Size of a pixel along each axis, from the header; None if it has none."""
  is_nifti = suffix_of(path) in nifti.SUFFIXES
  return nifti.read_grid(path).spacing if is_nifti else None


def check_same_place(image: pathlib.Path, mask: pathlib.Path) -> None:
  """Raises a UserError if both tell where their pixels are, and it differs."""
  kinds = [suffix_of(path) in nifti.SUFFIXES for path in (image, mask)]
  if any(kinds):
    nifti.check_same_place(image, mask)


def to_image(
  array: np.ndarray, *, channels: int | None, dims: int, name: str
) -> np.ndarray:
  """An array [*S] or [*S, c] as `read_image` would give it from a file `name`.

  Raises:
    UserError: of another type or shape, or not finite.
  """
  if array.ndim == dims:
    array = array[..., None]
  if array.ndim != dims + 1:
    raise UserError(
      f"{name}: has shape {array.shape}; expected {dims} spatial axes, then"
      " channels"
    )
  kind, num_bytes = array.dtype.kind, array.dtype.itemsize
  if kind not in "buf" or (kind == "u" and num_bytes > 2):
    raise UserError(
      f"{name}: {array.dtype} images have no known range; save uint8, uint16 or"
      " float32"
    )
  with np.errstate(over="ignore"):  # What is too large is counted below.
    image = array.astype(np.float32)
  if kind == "u":
    image /= np.float32(2 ** (8 * num_bytes) - 1)
  if bad := image.size - np.count_nonzero(np.isfinite(image)):
    raise UserError(
      f"{name}: {bad} of {image.size} values are NaN or infinite in float32;"
      " replace them, or take the image out"
    )
  return image if channels is None else to_channels(image, channels, name)


def to_channels(image: np.ndarray, channels: int, name: str) -> np.ndarray:
  """float32 [*S, c] as [*S, channels]: grey repeated, colour as luma.

  Raises:
    UserError: it is neither.
  """
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


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
  """Turns any complaint of a decoder about damage into one of the file."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # Fuzzing met a dozen kinds, of four libraries.
    kind = path.suffix.lower()[1:]
    reason = " ".join(str(error).replace(f"'{path}'", "").split())
    raise UserError(
      f"{path}: not a readable {kind} file ({reason or type(error).__name__});"
      " replace it or take it out"
    ) from error


def _kind(path: pathlib.Path, dims: int) -> str:
  """Which of "picture", "npy" and "nifti" it is."""
  suffix = suffix_of(path)
  if suffix not in SUFFIXES:
    raise UserError(
      f"{path}: unknown kind of file; give one of {', '.join(SUFFIXES)}"
    )
  if suffix in nifti.SUFFIXES:
    if dims != 3:
      raise UserError(
        f"{path}: volumes have 3 axes but model.dims={dims}; nearest: 3"
      )
    return "nifti"
  if suffix != ".npy" and dims != 2:
    also = " or NIfTI" if dims == 3 else ""
    raise UserError(
      f"{path}: pictures have 2 axes but model.dims={dims}; give .npy{also}"
      " files"
    )
  return "npy" if suffix == ".npy" else "picture"


def _to_ids(array: np.ndarray, path: pathlib.Path) -> np.ndarray:
  """Label ids int64, of whichever numbers they are kept as."""
  if array.dtype.kind == "f":
    odd = array.size - np.count_nonzero(array == np.trunc(array))
    if odd or not (abs(array) < 2**31).all():
      raise UserError(
        f"{path}: {odd} of {array.size} values are no whole numbers; a mask"
        " holds class ids"
      )
  return array.astype(np.int64)


def _check_size(
  size: tuple[int, ...], max_pixels: int, path: pathlib.Path
) -> None:
  if math.prod(size) > max_pixels:
    raise UserError(
      f"{path}: {' x '.join(map(str, size))} pixels are more than"
      f" data.max_pixels={max_pixels}; raise it or cut the image up"
    )


# --- npy ----------------------------------------------------------------------


def npy_header(path: pathlib.Path, dims: int) -> np.ndarray:
  """The file, mapped but not read: only shape and dtype are known."""
  with naming(path):
    if storage.is_remote(path):  # Nothing to map: an array that has no memory.
      with path.open("rb") as file:
        first = np.lib.format.read_magic(file) == (1, 0)
        name = f"read_array_header_{1 if first else 2}_0"
        shape, _, dtype = getattr(np.lib.format, name)(file)
      header = np.broadcast_to(np.empty((), dtype), shape)
    else:
      header = np.lib.format.open_memmap(path, mode="r")
  if header.ndim not in (dims, dims + 1) or header.size == 0:
    raise UserError(
      f"{path}: shape {header.shape} does not fit model.dims={dims}; save"
      f" {dims} axes, or {dims + 1} with the channels last"
    )
  return header


def _read_npy(path: pathlib.Path, dims: int, max_pixels: int) -> np.ndarray:
  # Every value counts, so that channels cannot hide a huge array.
  _check_size(npy_header(path, dims).shape, max_pixels, path)
  with naming(path):
    # Read, not mapped: a mapped file that shrinks would kill the process.
    with path.open("rb") as file:
      return np.load(file, allow_pickle=False)


# --- Pillow -------------------------------------------------------------------


@contextlib.contextmanager
def _open_picture(path: pathlib.Path) -> Iterator[Image.Image]:
  """Reads the header; damage is reported with the file's name."""
  # By handle: given a name, Pillow (13.0) maps plain TIFF files and gets those
  # that are turned by their orientation wrong.
  with naming(path), path.open("rb") as file:
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
    raw_mode = args if isinstance(args, str) else args[0]
    if _is_narrowed(picture, raw_mode):
      raise UserError(
        f"{path}: 16-bit colour would be cut to 8 bits; save 8-bit colour,"
        " 16-bit grey or npy"
      )
    # Before exif_transpose: loading a TIFF turns it, and would do so again.
    picture.load()
    upright = ImageOps.exif_transpose(picture)
  if upright.size != size[::-1]:
    raise UserError(
      f"{path}: its EXIF orientation comes after the pixels; save it again"
      " without EXIF"
    )
  return upright, _GREY_STEP.get(raw_mode, 1)


def _is_narrowed(picture: Image.Image, raw_mode: str) -> bool:
  """Whether Pillow keeps 8 bits of 16, as it does of all but plain grey."""
  # Raw modes of PNG tell; those of TIFF do not if colours lie in planes.
  tags = getattr(picture, "tag_v2", {})
  bits = max(tags.get(ExifTags.Base.BitsPerSample, (8,)))
  is_wide = bits > 8 or raw_mode.endswith(";16B")
  return is_wide and len(picture.getbands()) > 1
