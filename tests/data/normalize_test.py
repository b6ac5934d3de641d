"""Statistics against numpy over all pixels at once, in float64."""

import json

import numpy as np

from unet_jax.data.normalize import fit_normalization, normalize


class Images(list):
  """A source that has images and nothing else."""

  image = list.__getitem__


def images(offset=0.0):
  rng = np.random.default_rng(0)
  sizes = [(7, 5), (3, 3), (1, 1), (20, 4)]
  return Images(
    (offset + rng.normal(i, 1 + i, (*s, 2))).astype(np.float32)
    for i, s in enumerate(sizes)
  )


def test_dataset_is_the_moments_of_all_pixels():
  source = images(offset=3000)
  pixels = np.concatenate(
    [image.reshape(-1, 2).astype(np.float64) for image in source]
  )
  fitted = fit_normalization(source, "dataset", num_threads=3)
  np.testing.assert_allclose(fitted["mean"], pixels.mean(0), rtol=1e-13)
  np.testing.assert_allclose(fitted["std"], pixels.std(0), rtol=1e-10)
  # Ready for JSON, and indifferent to order.
  assert json.loads(json.dumps(fitted)) == fitted
  np.testing.assert_allclose(
    fit_normalization(Images(source[::-1]), "dataset")["std"],
    fitted["std"],
    rtol=1e-15,
  )
  image = source[0]
  want = (image.astype(np.float64) - pixels.mean(0)) / pixels.std(0)
  got = normalize(image, fitted)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_image_mode_for_each_channel_and_rank():
  rng = np.random.default_rng(1)
  fitted = fit_normalization([], "image")
  for size in [(50,), (9, 8), (5, 6, 7)]:
    scale, shift = np.array([1e-3, 5.0, 400.0]), np.array([1000.0, -3.0, 0.0])
    image = (rng.normal(size=(*size, 3)) * scale + shift).astype(np.float32)
    pixels = normalize(image, fitted).astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(pixels.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(pixels.std(0), 1, atol=1e-6)


def test_constant_channels_become_zero():
  image = np.full((7, 9, 2), 0.1, np.float32)
  image[..., 1] = np.arange(63).reshape(7, 9)
  got = normalize(image, fit_normalization([], "image"))
  assert (got[..., 0] == 0).all() and got[..., 1].std() > 0.99
  fitted = fit_normalization(Images([image]), "dataset")
  assert (normalize(image, fitted)[..., 0] == 0).all()


def test_none_changes_nothing():
  image = images()[0]
  np.testing.assert_array_equal(
    normalize(image, fit_normalization([], "none")), image
  )
