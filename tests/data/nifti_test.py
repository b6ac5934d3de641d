"""NIfTI files, against nibabel: axes, orientation, affines, what is refused."""

import gzip
import itertools
import struct

import numpy as np
import pytest

from unet_jax.data import decode, nifti
from unet_jax.errors import UserError

nib = pytest.importorskip("nibabel")

SIZE = (3, 5, 4)


def voxels(dtype=np.int16, size=SIZE, seed=0):
  return np.random.default_rng(seed).integers(0, 100, size).astype(dtype)


def save(path, array, affine=None, kind=nib.Nifti1Image, slope=None):
  affine = np.diag([1.0, 1, 1, 1]) if affine is None else affine
  image = kind(array, affine)
  if slope:
    image.header.set_slope_inter(*slope)
  nib.save(image, path)
  return path


def affine_of(codes, spacing=(1.0, 2.0, 3.5)):
  """An affine of axes that run to these sides, a little oblique."""
  turn = nib.orientations.axcodes2ornt(codes)
  plain = np.diag([*(np.array(spacing)), 1.0])
  plain[:3, 3] = 7, -3, 11
  out = plain @ nib.orientations.inv_ornt_aff(turn, SIZE)
  angle = np.radians(7)
  tilt = np.eye(4)
  tilt[:2, :2] = [
    [np.cos(angle), -np.sin(angle)],
    [np.sin(angle), np.cos(angle)],
  ]
  return tilt @ out


CODES = [
  "".join(side[k] for side, k in zip(sides, signs, strict=True))
  for sides in itertools.permutations(("LR", "PA", "IS"))
  for signs in itertools.product((0, 1), repeat=3)
]


@pytest.mark.parametrize("codes", CODES)
def test_every_orientation_is_read_and_written_as_nibabel_does(tmp_path, codes):
  path = save(tmp_path / "v.nii.gz", voxels(), affine_of(codes))
  want = nib.as_closest_canonical(nib.load(path))
  got = nifti.read_voxels(path, 1000)
  np.testing.assert_array_equal(got, want.get_fdata())
  grid = nifti.read_grid(path)
  assert grid.size == want.shape == decode.image_size(path, 3)
  np.testing.assert_allclose(grid.affine, want.affine, atol=1e-5)
  np.testing.assert_allclose(grid.spacing, want.header.get_zooms(), rtol=1e-5)
  # A mask made here goes back to the voxels that it was made from.
  mask = (got > 50).astype(np.uint8)
  (tmp_path / "m.nii.gz").write_bytes(nifti.mask_bytes(mask, path))
  image, saved = nib.load(path), nib.load(tmp_path / "m.nii.gz")
  np.testing.assert_array_equal(saved.dataobj, image.get_fdata() > 50)
  assert saved.get_data_dtype() == np.uint8
  np.testing.assert_array_equal(saved.affine, image.affine)
  for name in ("pixdim", "qform_code", "sform_code", "xyzt_units"):
    np.testing.assert_array_equal(saved.header[name], image.header[name])
  features = np.stack([got, got + 1], -1)
  back = nifti.to_file_axes(features, path)
  np.testing.assert_array_equal(back[..., 0], image.get_fdata())


@pytest.mark.parametrize(
  "dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"]
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_values_are_those_of_the_file(tmp_path, dtype, suffix, kind):
  array = voxels(dtype)
  path = save(tmp_path / f"v{suffix}", array, kind=kind)
  image = decode.read_image(path, channels=1, dims=3, max_pixels=60)
  assert image.dtype == np.float32
  np.testing.assert_array_equal(image[..., 0], array)
  ids = decode.read_mask(path, dims=3, max_pixels=60)
  assert ids.dtype == np.int64
  np.testing.assert_array_equal(ids, array)


def test_the_headers_scale_is_applied(tmp_path):
  path = save(tmp_path / "v.nii", voxels(), slope=(0.5, -20.0))
  image = decode.read_image(path, channels=1, dims=3, max_pixels=60)
  np.testing.assert_allclose(image[..., 0], 0.5 * voxels() - 20)
  with pytest.raises(UserError, match="whole numbers"):
    decode.read_mask(path, dims=3, max_pixels=60)


def test_extensions_are_skipped(tmp_path):
  image = nib.Nifti1Image(voxels(), np.eye(4))
  note = nib.nifti1.Nifti1Extension("comment", b"x" * 999)
  image.header.extensions.append(note)
  nib.save(image, tmp_path / "v.nii.gz")
  path = tmp_path / "v.nii.gz"
  np.testing.assert_array_equal(nifti.read_voxels(path, 60), voxels())
  content = nifti.mask_bytes(np.ones(SIZE, np.uint8), path)
  mask = nib.Nifti1Image.from_bytes(gzip.decompress(content))
  assert not mask.header.extensions and (mask.get_fdata() == 1).all()


def test_names_end_in_two_suffixes(tmp_path):
  path = tmp_path / "case.1.NII.GZ"
  assert decode.suffix_of(path) == ".nii.gz"
  assert decode.stem_of(path) == "case.1"
  assert decode.stem_of(tmp_path / "a.b.npy") == "a.b"
  assert decode.suffix_of(tmp_path / "a.gz") == ".gz"


# --- What is refused, in one line with the file's name ------------------------


def refuse(path, message, max_pixels=1000, dims=3):
  with pytest.raises(UserError, match=message) as caught:
    decode.read_image(path, channels=1, dims=dims, max_pixels=max_pixels)
  assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_shapes_and_dtypes(tmp_path):
  path = save(tmp_path / "series.nii", voxels(size=(3, 4, 5, 2)))
  refuse(path, "has shape .3, 4, 5, 2.; give volumes of 3 axes")
  refuse(save(tmp_path / "flat.nii", voxels(size=(3, 4))), "has shape .3, 4.")
  refuse(save(tmp_path / "c.nii", voxels(np.complex64)), "no intensities")
  rgb = np.zeros(SIZE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
  refuse(save(tmp_path / "rgb.nii", rgb), "no intensities")
  path = save(tmp_path / "v.nii", voxels())
  refuse(path, "volumes have 3 axes but model.dims=2", dims=2)
  bad = voxels(np.float32)
  bad[1, 2, 3] = np.nan
  refuse(save(tmp_path / "nan.nii", bad), "1 of 60 values are NaN")
  refuse(save(tmp_path / "big.nii", voxels("f8") * 1e40), "infinite in float32")


def test_damage(tmp_path):
  whole = save(tmp_path / "v.nii.gz", voxels()).read_bytes()
  plain = gzip.decompress(whole)
  broken = {
    "cut.nii.gz": whole[:-30],
    "cut.nii": plain[:-30],
    "header.nii": plain[:200],
    "empty.nii": b"",
    "text.nii": b"not a volume" * 100,
    "plain.nii.gz": plain,
    "packed.nii": whole,
    "magic.nii": plain[:344] + b"abcd" + plain[348:],
  }
  for name, content in broken.items():
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, "not a readable NIfTI file")


def with_field(path, offset, form, *values):
  """The same file with another number in its header."""
  content = bytearray(gzip.decompress(path.read_bytes()))
  struct.pack_into(form, content, offset, *values)
  path.write_bytes(gzip.compress(bytes(content)))
  return path


def test_a_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
  path = save(tmp_path / "v.nii.gz", voxels())
  refuse(path, r"3 x 5 x 4 voxels are more than .*=59", max_pixels=59)
  read = []
  unpack = gzip.GzipFile.read

  def counting(self, size=-1):
    data = unpack(self, size)
    read.append(len(data))
    return data

  monkeypatch.setattr(gzip.GzipFile, "read", counting)
  # dim[1..3]: 30000^3 voxels; 100 MB of zeros behind the header.
  with_field(path, 42, "<3h", 30000, 30000, 30000)
  head = gzip.decompress(path.read_bytes())
  path.write_bytes(gzip.compress(head + bytes(10**8), 1))
  read.clear()
  refuse(path, "more than data.max_pixels", max_pixels=2**27)
  assert sum(read) < 10**5
  # An extension that says it has 2 GB, before voxels that are there.
  path = save(tmp_path / "e.nii.gz", voxels())
  head = gzip.decompress(path.read_bytes())
  head = head[:348] + struct.pack("<4b2i", 1, 0, 0, 0, 2**31 - 16, 6)
  path.write_bytes(gzip.compress(head + bytes(10**8), 1))
  with_field(path, 108, "<f", 384)
  read.clear()
  nifti.read_voxels(path, 60)
  assert sum(read) < 10**5
  # vox_offset: voxels far behind the header.
  path = save(tmp_path / "o.nii.gz", voxels())
  with_field(path, 108, "<f", 3e38)
  refuse(path, "its voxels start at byte 3")


def test_an_affine_that_is_none(tmp_path):
  path = save(tmp_path / "v.nii.gz", voxels())
  # srow_x, of the sform.
  with_field(path, 280, "<4f", 0, 0, 0, 0)
  refuse(path, "maps the volume to a plane")


def test_image_and_mask_must_lie_on_one_another(tmp_path):
  image = save(tmp_path / "i.nii", voxels(), affine_of("RAS"))
  for codes in ("RAS", "LPS", "LAS"):  # The same place, stored otherwise.
    turn = nib.orientations.axcodes2ornt(codes)
    turned = nib.load(image).as_reoriented(turn)
    nib.save(turned, tmp_path / "m.nii")
    decode.check_same_place(image, tmp_path / "m.nii")
    np.testing.assert_array_equal(
      nifti.read_voxels(tmp_path / "m.nii", 60), voxels()
    )
  for change in ((0, 3, 0.3), (1, 1, 0.2), (0, 0, -2)):
    moved = affine_of("RAS")
    moved[change[:2]] += change[2]
    mask = save(tmp_path / "m.nii", voxels(), moved)
    with pytest.raises(UserError, match=r"i.nii and .*m.nii lie .* apart"):
      decode.check_same_place(image, mask)
  rounded = save(tmp_path / "m.nii", voxels(), affine_of("RAS") + 1e-4)
  decode.check_same_place(image, rounded)
  np.save(tmp_path / "m.npy", voxels(np.uint8))
  decode.check_same_place(image, tmp_path / "m.npy")
  image = save(tmp_path / "i.nii", voxels(), affine_of("LPS"))
  with pytest.raises(UserError, match="is turned by its header"):
    decode.check_same_place(image, tmp_path / "m.npy")


def test_without_nibabel_the_extra_is_named(tmp_path, monkeypatch):
  path = save(tmp_path / "v.nii", voxels())
  monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
  with pytest.raises(UserError, match=r"pip install 'unet_jax\[nifti\]'"):
    decode.image_size(path, 3)
