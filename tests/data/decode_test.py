"""Decoding is judged by the array that was written, in every mode."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from unet_jax.data import decode
from unet_jax.errors import UserError

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
RGB = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)


def image(path, channels=1, dims=2, max_pixels=10**6):
  return decode.read_image(
    path, channels=channels, dims=dims, max_pixels=max_pixels
  )


def mask(path, dims=2, max_pixels=10**6):
  return decode.read_mask(path, dims=dims, max_pixels=max_pixels)


def save(path, array, **options):
  Image.fromarray(array).save(path, **options)
  return path


def refused(call, path, *words):
  with pytest.raises(UserError) as error:
    call(path)
  message = str(error.value)
  assert str(path) in message and "\n" not in message
  for word in words:
    assert word in message


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff", "bmp"])
def test_8_bit_images(tmp_path, suffix):
  path = save(tmp_path / f"a.{suffix}", GREY)
  np.testing.assert_array_equal(image(path)[..., 0], GREY / np.float32(255))
  path = save(tmp_path / f"b.{suffix}", RGB)
  np.testing.assert_array_equal(image(path, 3), RGB / np.float32(255))
  assert image(path, 3).dtype == np.float32


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_images_keep_all_bits(tmp_path, suffix):
  values = np.array([[0, 255, 256], [300, 40000, 65535]], np.uint16)
  path = save(tmp_path / f"a.{suffix}", values)
  np.testing.assert_allclose(image(path)[..., 0], values / 65535, rtol=1e-6)
  np.testing.assert_array_equal(mask(path), values)


def test_bits_and_alpha(tmp_path):
  bits = GREY > 100
  path = save(tmp_path / "bits.png", bits)
  np.testing.assert_array_equal(image(path)[..., 0], bits)
  np.testing.assert_array_equal(mask(path), bits)
  rgba = np.dstack([RGB, np.full_like(GREY, 7)])
  path = save(tmp_path / "rgba.png", rgba)
  np.testing.assert_array_equal(image(path, 3), RGB / np.float32(255))
  path = save(tmp_path / "la.png", np.dstack([GREY, 255 - GREY]))
  np.testing.assert_array_equal(image(path)[..., 0], GREY / np.float32(255))


def test_grey_and_colour_are_converted(tmp_path):
  grey, colour = save(tmp_path / "g.png", GREY), save(tmp_path / "c.png", RGB)
  for channel in range(3):
    want = GREY / np.float32(255)
    np.testing.assert_array_equal(image(grey, 3)[..., channel], want)
  r, g, b = (RGB[..., i] / 255 for i in range(3))
  want = 0.299 * r + 0.587 * g + 0.114 * b
  np.testing.assert_allclose(image(colour, 1)[..., 0], want, atol=1e-6)
  refused(lambda p: image(p, 4), colour, "3 channels", "data.channels=4")


def test_palette_is_colours_for_images_and_indexes_for_masks(tmp_path):
  ids = np.array([[0, 1], [2, 1]], np.uint8)
  picture = Image.fromarray(ids, "L").convert("P")
  picture.putdata(ids.ravel())
  picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
  path = tmp_path / "palette.png"
  picture.save(path)
  np.testing.assert_array_equal(mask(path), ids)
  colours = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]])[ids]
  np.testing.assert_allclose(image(path, 3), colours / 255, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_of_few_bits_are_not_stretched(tmp_path, bits):
  ids = np.arange(4, dtype=np.uint8).reshape(2, 2)
  Image.fromarray(ids).save(tmp_path / "few.png", bits=bits)
  np.testing.assert_array_equal(mask(tmp_path / "few.png"), ids)


def test_colour_masks(tmp_path):
  same = save(tmp_path / "same.png", np.dstack([GREY] * 3))
  np.testing.assert_array_equal(mask(same), GREY)
  refused(mask, save(tmp_path / "rgb.png", RGB), "RGB", "ids")
  rgba = save(tmp_path / "rgba.png", np.dstack([GREY] * 4))
  refused(mask, rgba, "RGBA")
  refused(mask, save(tmp_path / "lossy.jpg", GREY), "JPEG")


def wide_png(pixels):
  """A PNG of uint16 [h, w, c], by the letter of RFC 2083."""

  def chunk(kind, data):
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

  height, width, channels = pixels.shape
  colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
  header = struct.pack(">2I5B", width, height, 16, colour_type, 0, 0, 0)
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
  chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def wide_tiff(pixels, planar):
  """An uncompressed TIFF 6.0 of uint16 [h, w, 3], in one strip a plane."""
  planes = np.moveaxis(pixels, -1, 0) if planar else pixels[None]
  planes = [p.astype("<u2").tobytes() for p in planes]
  num, size = len(planes), len(planes[0])
  lists = 8 + 2 + 10 * 12 + 4  # Behind the header and the only directory.
  data = lists + 8 + 8 * num
  starts = [data + i * size for i in range(num)]
  tags = [
    (256, 4, 1, pixels.shape[1]),
    (257, 4, 1, pixels.shape[0]),
    (258, 3, 3, lists),  # Bits a sample.
    (259, 3, 1, 1),
    (262, 3, 1, 2),
    (273, 4, num, lists + 8 if planar else data),
    (277, 3, 1, 3),
    (278, 4, 1, pixels.shape[0]),
    (279, 4, num, lists + 8 + 4 * num if planar else size),
    (284, 3, 1, 2 if planar else 1),
  ]
  parts = [struct.pack("<2sHIH", b"II", 42, 8, len(tags))]
  parts += [struct.pack("<HHII", *tag) for tag in tags]
  bits = (16, 16, 16, 0)
  parts += [struct.pack("<I4H", 0, *bits)]
  parts += [struct.pack(f"<{2 * num}I", *starts, *[size] * num), *planes]
  return b"".join(parts)


@pytest.mark.parametrize("kind", ["la", "rgb", "rgba", "tiff", "planar"])
def test_16_bit_colour_is_refused_as_pillow_would_cut_it(tmp_path, kind):
  channels = {"la": 2, "rgba": 4}.get(kind, 3)
  pixels = np.full((3, 4, channels), 258, np.uint16)
  if kind in ("tiff", "planar"):
    path, data = tmp_path / "a.tif", wide_tiff(pixels, kind == "planar")
  else:
    path, data = tmp_path / "a.png", wide_png(pixels)
  path.write_bytes(data)
  with Image.open(path) as picture:  # The file is whole, but 258 is 1 or 2.
    assert set(np.unique(np.asarray(picture))) <= {1, 2}
  refused(lambda p: image(p, 3), path, "16-bit colour", "npy")
  refused(mask, path, "16-bit colour")
  path = tmp_path / "grey.png"
  path.write_bytes(wide_png(pixels[..., :1]))
  assert (mask(path) == 258).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite_are_refused(tmp_path, bad):
  path = tmp_path / "a.npy"
  pixels = np.ones((4, 5))
  pixels[1, 2:4] = bad
  np.save(path, pixels)
  refused(image, path, "2 of 20 values")
  if bad < 1e300 or np.isinf(bad):
    path = save(tmp_path / "a.tif", pixels.astype(np.float32))
    refused(image, path, "2 of 20 values")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, suffix, orientation):
  # EXIF 2.3, tag 274: where row 0 and column 0 of the stored array belong.
  upright = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a),
  }[orientation]
  # Flat 8 x 8 blocks survive JPEG.
  stored = np.kron(GREY, np.ones((8, 8), np.uint8))
  exif = Image.Exif()
  exif[274] = orientation
  options = {"quality": 100} if suffix == "jpg" else {}
  path = save(tmp_path / f"a.{suffix}", stored, exif=exif, **options)
  want = upright(stored)
  assert decode.image_size(path, 2) == want.shape
  np.testing.assert_allclose(image(path)[..., 0] * 255, want, atol=2)
  if suffix != "jpg":
    np.testing.assert_array_equal(mask(path), want)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_npy_of_any_rank(tmp_path, dims):
  rng = np.random.default_rng(0)
  size = (4, 5, 6)[:dims]
  path = tmp_path / "a.npy"
  floats = rng.normal(size=(*size, 2))
  np.save(path, floats)
  got = image(path, 2, dims)
  np.testing.assert_array_equal(got, floats.astype(np.float32))
  assert decode.image_size(path, dims) == size
  np.save(path, floats[..., 0])
  np.testing.assert_array_equal(image(path, 1, dims)[..., 0], got[..., 0])
  words = rng.integers(0, 2**16, size).astype(np.uint16)
  np.save(path, words)
  want = (words / 65535)[..., None]
  np.testing.assert_allclose(image(path, 1, dims), want, rtol=1e-6)
  np.testing.assert_array_equal(mask(path, dims), words)
  np.save(path, words.astype(np.int64) - 1)
  np.testing.assert_array_equal(mask(path, dims), words.astype(int) - 1)
  refused(lambda p: image(p, 1, dims), path, "int64")
  np.save(path, floats)
  refused(lambda p: mask(p, dims), path, "float64")
  refused(lambda p: image(p, 2, dims + 2), path, "shape")


def test_npy_pickles_and_bombs_are_refused(tmp_path):
  path = tmp_path / "a.npy"
  np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
  refused(lambda p: image(p, dims=1), path)
  header = {"descr": "<f4", "fortran_order": False, "shape": (2**20, 2**20)}
  with path.open("wb") as file:
    np.lib.format.write_array_header_1_0(file, header)
  refused(image, path)
  np.save(path, np.zeros((10, 10, 1), np.float32))
  refused(lambda p: image(p, max_pixels=99), path, "data.max_pixels=99")


def test_large_pictures_are_refused_before_decoding(tmp_path, monkeypatch):
  path = save(tmp_path / "a.png", GREY)

  def load(*_):
    raise AssertionError("decoded")

  monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
  refused(lambda p: image(p, max_pixels=11), path, "3 x 4", "max_pixels=11")
  assert decode.image_size(path, 2) == (3, 4)


def test_frames_kinds_and_ranks(tmp_path):
  frames = [Image.fromarray(GREY), Image.fromarray(GREY.copy())]
  for name in ("a.tif", "a.png"):
    path = tmp_path / name
    frames[0].save(path, save_all=True, append_images=[Image.new("L", (4, 3))])
    refused(image, path, "2 frames")
  refused(image, tmp_path / "a.gif", "unknown kind")
  refused(image, tmp_path / "none.png")
  cmyk = tmp_path / "cmyk.jpg"
  Image.new("CMYK", (4, 3)).save(cmyk)
  refused(lambda p: image(p, 3), cmyk, "CMYK")
  refused(lambda p: image(p, dims=3), save(tmp_path / "b.png", GREY), "npy")


def test_renamed_files(tmp_path):
  for wrong in ("a.jpg", "a.tif", "a.bmp", "a.npy"):
    save(tmp_path / wrong, GREY, format="PNG")
    refused(image, tmp_path / wrong)
    refused(lambda p: decode.image_size(p, 2), tmp_path / wrong)
  save(tmp_path / "b.png", GREY, format="JPEG")
  refused(mask, tmp_path / "b.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "npy"])
@pytest.mark.filterwarnings("ignore")  # Pillow also warns of damage.
def test_damage_is_a_user_error(tmp_path, suffix):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (16, 16)).astype(np.uint8)
  path = tmp_path / f"a.{suffix}"
  np.save(path, pixels) if suffix == "npy" else save(path, pixels)
  whole = path.read_bytes()
  for end in {0, 1, 7, 30, len(whole) // 2, len(whole) - 40}:
    path.write_bytes(whole[:end])
    refused(image, path)
  # Flipped bits must be noticed as a UserError or give an image.
  for position in range(0, len(whole), 2):
    broken = bytearray(whole)
    broken[position] ^= 1 << int(rng.integers(8))
    path.write_bytes(bytes(broken))
    try:
      assert image(path, max_pixels=10**5).dtype == np.float32
    except UserError as error:
      assert str(path) in str(error)
