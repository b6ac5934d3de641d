"""NIfTI volumes: arrays in, masks out. The only module that knows nibabel.

Arrays have three axes, turned and mirrored so that they run to the right, to
the front and up as nearly as the file's own axes allow (nibabel's closest
canonical orientation): volumes that scanners store otherwise look alike, and
nothing is resampled. `mask_bytes` turns a mask back to the file's axes.

A header says how much is to be decoded, and is believed only then: what is
larger than allowed is refused before anything is unpacked.
"""

import contextlib
import gzip
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from unet_jax.errors import UserError

SUFFIXES = (".nii", ".nii.gz")
# Bytes of the header of NIfTI-1 and NIfTI-2, their first number.
_HEADERS = {348: "Nifti1", 540: "Nifti2"}
# Most bytes before the voxels; more would be unpacked only to be skipped.
_MOST_EXTENSIONS = 2**24
# Voxels by which image and mask may lie apart.
_TOLERANCE = 0.1


class Grid(NamedTuple):
  """Where the voxels of a volume are, in the order of the arrays here.

  Attributes:
    size: voxels along each axis.
    spacing: millimetres (or what the header means) from voxel to voxel.
    affine: float64 [4, 4], from voxel to world coordinates.
  """

  size: tuple[int, ...]
  spacing: tuple[float, ...]
  affine: np.ndarray


def read_grid(path: pathlib.Path) -> Grid:
  """The grid of a volume, from its header alone.

  Raises:
    UserError: no such volume can be read.
  """
  header, _ = _read_header(path)
  size, turn = header.get_data_shape(), _orientation(header)
  affine = header.get_best_affine()
  affine = affine @ _nibabel().orientations.inv_ornt_aff(turn, size)
  # The axis of the file that each axis here is.
  axes = np.argsort(turn[:, 0])
  spacing = np.linalg.norm(affine[:3, :3], axis=0)
  return Grid(tuple(size[i] for i in axes), tuple(spacing.tolist()), affine)


def read_voxels(path: pathlib.Path, max_voxels: int) -> np.ndarray:
  """The values of a volume, in its own units and scaled as its header says.

  Raises:
    UserError: no such volume can be read, or it has more than `max_voxels`.
  """
  nib = _nibabel()
  header, _ = _read_header(path)
  size = header.get_data_shape()
  if math.prod(size) > max_voxels:
    raise UserError(
      f"{path}: {' x '.join(map(str, size))} voxels are more than"
      f" data.max_pixels={max_voxels}; raise it or cut the volume up"
    )
  with _naming(path), _open(path) as stream:
    # By the header, not as an image: that reads extensions of any size. Read,
    # not mapped: a mapped file that shrinks would kill the process.
    proxy = nib.arrayproxy.ArrayProxy(stream, header, mmap=False)
    voxels = np.asanyarray(proxy)
  return nib.orientations.apply_orientation(voxels, _orientation(header))


def check_same_place(image: pathlib.Path, mask: pathlib.Path) -> None:
  """Raises a UserError if the voxels of the two do not lie on one another.

  Of two sizes nothing is said here; other kinds of files lie in the order of
  the arrays here.
  """
  grids = [
    read_grid(p) if p.name.lower().endswith(SUFFIXES) else None
    for p in (image, mask)
  ]
  if None in grids:
    path, other = (image, mask) if grids[0] else (mask, image)
    if not _is_plain(_orientation(_read_header(path)[0])):
      raise UserError(
        f"{path} is turned by its header, of which {other} knows nothing; give"
        " both as NIfTI"
      )
    return
  first, second = grids
  if first.size != second.size:
    return
  corners = np.array([*np.ndindex(2, 2, 2)]) * np.array(first.size)
  apart = (first.affine - second.affine) @ np.c_[corners, np.ones(8)].T
  distance = np.linalg.norm(apart[:3], axis=0).max() / min(first.spacing)
  if not distance <= _TOLERANCE:
    raise UserError(
      f"{image} and {mask} lie {distance:.3g} voxels apart, by the affines of"
      " their headers; give the mask the image's affine"
    )


def mask_bytes(mask: np.ndarray, like: pathlib.Path) -> bytes:
  """A mask as `.nii.gz`, with the header, affine and axes of `like`.

  Args:
    mask: uint8 [*S], its axes those of `read_voxels(like)`.
    like: the volume that was predicted.
  """
  nib = _nibabel()
  header, kind = _read_header(like)
  affine = header.get_best_affine()
  mask = to_file_axes(mask, like)
  # The window and the scaling of the image would blacken the mask.
  header["cal_min"] = header["cal_max"] = 0
  header.set_slope_inter(1, 0)
  header.set_data_dtype(np.uint8)
  header["vox_offset"] = 0  # Extensions are not kept.
  image = getattr(nib, f"{kind}Image")(mask, affine, header)
  return gzip.compress(image.to_bytes(), mtime=0)


def to_file_axes(array: np.ndarray, path: pathlib.Path) -> np.ndarray:
  """[*S, ...] as `read_voxels` orders it, in the order of the file itself."""
  orientations = _nibabel().orientations
  turn = _orientation(_read_header(path)[0])
  back = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), turn)
  return orientations.apply_orientation(array, back)


def _orientation(header: Any) -> np.ndarray:
  """The axis here that each axis of the file is, and its sign, [3, 2]."""
  return _nibabel().orientations.io_orientation(header.get_best_affine())


def _is_plain(turn: np.ndarray) -> bool:
  return (turn == [[0, 1], [1, 1], [2, 1]]).all()


# --- Files --------------------------------------------------------------------


def _nibabel() -> Any:
  try:
    import nibabel
  except ImportError as error:
    raise UserError(
      "NIfTI files need nibabel, which is not installed; pip install"
      " 'unet_jax[nifti]'"
    ) from error
  return nibabel


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Turns any complaint of a decoder about damage into one of the file."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # Of gzip, of zlib, of nibabel, of NumPy.
    reason = " ".join(str(error).split()) or type(error).__name__
    raise UserError(
      f"{path}: not a readable NIfTI file ({reason}); replace it or take it out"
    ) from error


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[Any]:
  with path.open("rb") as file:
    if path.name.lower().endswith(".gz"):
      with gzip.GzipFile(fileobj=file) as stream:
        yield stream
    else:
      yield file


def _read_header(path: pathlib.Path) -> tuple[Any, str]:
  """The header, without its extensions, and the name of its kind."""
  nib = _nibabel()
  with _naming(path), _open(path) as stream:
    start = stream.read(max(_HEADERS))
    first = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    found = [size for size in _HEADERS if size in first]
    if not found or len(start) < found[0]:
      raise ValueError("no NIfTI header")
    kind = _HEADERS[found[0]]
    header = getattr(nib, f"{kind}Header")(start[: found[0]])
  _check_header(header, path)
  return header, kind


def _check_header(header: Any, path: pathlib.Path) -> None:
  size = header.get_data_shape()
  if len(size) != 3 or min(size) < 1:
    raise UserError(
      f"{path}: has shape {size}; give volumes of 3 axes, of a series each as a"
      " file (nibabel.four_to_three)"
    )
  if header.get_data_dtype().kind not in "iuf":
    raise UserError(
      f"{path}: {header.get_data_dtype()} voxels are no intensities; save"
      " integers or floats"
    )
  start = float(header["vox_offset"])
  if not 0 <= start <= _MOST_EXTENSIONS:
    raise UserError(
      f"{path}: its voxels start at byte {start:.0f}; save it again without"
      " extensions"
    )
  affine = header.get_best_affine()
  if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine) < 4:
    raise UserError(
      f"{path}: its affine maps the volume to a plane; mend sform or qform"
    )
