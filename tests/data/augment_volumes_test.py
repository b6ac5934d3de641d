"""Augmentation of volumes: every transform in space, with and without spacing.

Against scipy's map_coordinates in double, NumPy and closed forms.
"""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.ndimage

from tests.data.augment_test import (
  FULL,
  OFF,
  keys_kernel,
  make_batch,
  make_example,
  rotation,
)
from unet_jax.data import augment as augment_lib

PLANES = ((0, 1), (0, 2), (1, 2))


@jax.jit
def apply(example, draws, spacing=None):
  return augment_lib.apply_draws(example, draws, spacing)


def grid_of(size):
  return np.stack(np.meshgrid(*map(np.arange, size), indexing="ij")).astype(
    np.float64
  )


def assert_read(got, example, points):
  """The example, read at points [3, *S] as the module promises."""
  image, label, weight = example
  for channel in range(image.shape[-1]):
    want = scipy.ndimage.map_coordinates(
      image[..., channel].astype(np.float64), points, order=1, mode="mirror"
    )
    np.testing.assert_allclose(got[0][..., channel], want, atol=5e-5)
  sides = np.reshape(label.shape, (3, 1, 1, 1))
  clear = (np.abs(points % 1 - 0.5) > 1e-4).all(0)
  inside = ((points > -0.5) & (points < sides - 0.5)).all(0)
  assert clear.mean() > 0.9 and 0.2 < inside.mean()
  for after, before in zip(got[1:], (label, weight), strict=True):
    want = np.where(
      inside,
      scipy.ndimage.map_coordinates(before, points, order=0, mode="mirror"),
      0,
    )
    np.testing.assert_array_equal(np.asarray(after)[clear], want[clear])


@pytest.mark.parametrize("plane", range(3))
@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0), (3.0, 0.5, 1.0)])
def test_a_rotation_in_each_plane_turns_the_object_in_space(plane, spacing):
  size, angle = (7, 9, 8), 25.0
  example = make_example(*size, 2)
  angles = np.zeros(3, np.float32)
  angles[plane] = angle
  given = None if spacing is None else np.float32(spacing)
  got = apply(example, {"rotate": angles}, given)
  # In millimetres from the centre, turned, and back to pixels.
  h = np.reshape(spacing or (1.0, 1.0, 1.0), (3, 1, 1, 1))
  centre = (np.reshape(size, (3, 1, 1, 1)) - 1) / 2
  offsets = (grid_of(size) - centre) * h
  i, j = PLANES[plane]
  turned = offsets.copy()
  cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
  turned[i] = cos * offsets[i] - sin * offsets[j]
  turned[j] = sin * offsets[i] + cos * offsets[j]
  assert_read(got, example, turned / h + centre)


def test_all_that_resamples_at_once_with_spacing():
  size, spacing = (6, 9, 7), np.array([2.5, 0.7, 0.7])
  example = make_example(*size, 1)
  angles, shift, scale = (20.0, -35.0, 50.0), (0.1, -0.05, 0.2), 1.3
  vectors = np.random.default_rng(0).normal(size=(3, 3, 3, 3)).astype("f4")
  draws = {
    "rotate": np.float32(angles),
    "shift": np.float32(shift),
    "scale": np.float32(scale),
    "elastic": vectors.ravel(),
  }
  got = apply(example, draws, np.float32(spacing))
  h = spacing.reshape(3, 1, 1, 1)
  centre = (np.reshape(size, (3, 1, 1, 1)) - 1) / 2
  offsets = (grid_of(size) - centre) * h
  points = np.tensordot(rotation(angles, 3), offsets, 1) / scale / h + centre
  points -= np.reshape(shift, (3, 1, 1, 1)) * np.reshape(size, (3, 1, 1, 1))
  points += keys_field(vectors, size) * spacing.min() / h
  assert_read(got, example, points)


def keys_field(vectors, size):
  """Cubic convolution in three dimensions, one pixel after another."""
  field = np.zeros((3, *size))
  # A grid of 3, and beyond its ends a parabola through all three points.
  ends = np.array([[3, -3, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, -3, 3]])
  weights = []
  for n in size:
    at = np.linspace(0, 2, n)
    kernel = [[keys_kernel(x - k) for k in range(-1, 4)] for x in at]
    weights.append(np.array(kernel) @ ends)
  for index in np.ndindex(*size):
    w = [weights[axis][i] for axis, i in enumerate(index)]
    field[(slice(None), *index)] = np.einsum(
      "cxyz,x,y,z", vectors.astype(np.float64), *w
    )
  return field


@pytest.mark.parametrize("quarters", [(1, 3, 2), (3, 1, 1), (2, 0, 3)])
def test_no_quarter_turn_exchanges_axes_of_other_spacing(quarters):
  example = make_example(4, 4, 4, 1)
  spacing = np.float32([2.0, 1.0, 1.0])
  got = apply(example, {"turn": np.int32(quarters)}, spacing)
  want = [q & 2 for q in quarters[:2]] + [quarters[2]]
  for before, after in zip(example, got, strict=True):
    for k, plane in zip(want, PLANES, strict=True):
      before = np.rot90(before, k, plane)
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("form", ["take_pixels", "choose_pictures"])
@pytest.mark.parametrize("seed", range(3))
def test_flips_and_turns_of_unequal_sides_in_both_forms(form, seed):
  rng = np.random.default_rng(seed)
  example = make_example(4, 3, 4, 2)
  draws = {"flip": rng.random(3) > 0.5, "turn": rng.integers(0, 4, 3)}
  draws["turn"] = draws["turn"].astype(np.int32)
  got = jax.jit(getattr(augment_lib, form))(example, draws)
  for before, after in zip(example, got, strict=True):
    before = np.flip(before, np.flatnonzero(draws["flip"]))
    for k, (i, j) in zip(draws["turn"], PLANES, strict=True):
      equal = before.shape[i] == before.shape[j]
      before = np.rot90(before, k if equal else k & 2, (i, j))
    np.testing.assert_array_equal(after, before)


def test_grey_values_of_a_volume_by_their_formulas():
  image, label, weight = make_example(5, 4, 3, 2)
  noise = np.random.default_rng(1).normal(size=image.size).astype("f4")
  draws = {"brightness": 0.3, "contrast": 1.4, "gamma": 0.7, "noise": noise}
  draws = {name: np.float32(value) for name, value in draws.items()}
  got = apply((image, label, weight), draws)
  want = image.astype(np.float64)
  axes = (0, 1, 2)
  want = want + np.float32(0.3) * want.std(axes)
  want = want.mean(axes) + np.float32(1.4) * (want - want.mean(axes))
  low, high = want.min(axes), want.max(axes)
  want = low + (high - low) * ((want - low) / (high - low)) ** np.float32(0.7)
  want = want + noise.reshape(image.shape) * want.std(axes)
  np.testing.assert_allclose(got[0], want, atol=1e-4)
  np.testing.assert_array_equal(got[1], label)
  np.testing.assert_array_equal(got[2], weight)


def test_every_transform_changes_volumes_and_leaves_what_it_should():
  batch = make_batch(3, 8, 8, 8, 1)
  spacing = np.float32([[1, 1, 1], [3, 1, 1], [1, 0.5, 0.5]])
  names = set(augment_lib.TRANSFORMS)
  moving = {"flip", "turn", "shift", "rotate", "scale", "elastic"}
  for name in names:
    cfg = dataclasses.replace(OFF, **{name: getattr(FULL, name)})
    augment = jax.jit(augment_lib.make_augment(cfg))
    out = augment({**batch, "spacing": spacing}, jax.random.key(3))
    assert out.keys() == batch.keys()
    changed = (np.asarray(out["image"]) != batch["image"]).any()
    moved = (np.asarray(out["label"]) != batch["label"]).any()
    assert changed and moved == (name in moving), name
    if name in ("rotate", "elastic", "turn"):  # Spacings of 1 are none.
      plain = augment(batch, jax.random.key(3))
      np.testing.assert_array_equal(out["image"][0], plain["image"][0])
      assert (np.asarray(out["image"]) != plain["image"])[1:].any()


def test_labels_follow_the_volume_through_every_geometric_transform():
  names = ("flip", "turn", "shift", "rotate", "scale", "elastic")
  on = {name: getattr(FULL, name) for name in names}
  cfg = dataclasses.replace(OFF, **on, elastic_grid=3)
  batch = make_batch(4, 16, 16, 16, 1)
  blocks = np.random.default_rng(1).integers(0, 2, (4, 2, 2, 2))
  batch["label"] = np.kron(blocks, np.ones((8, 8, 8), int)).astype(np.int32)
  batch["image"] = batch["label"][..., None].astype(np.float32)
  batch["weight"][:] = 1
  batch["spacing"] = np.float32([[1, 1, 1], [2, 1, 1], [1, 3, 1], [1, 1, 0.5]])
  out = jax.jit(augment_lib.make_augment(cfg))(batch, jax.random.key(4))
  image = np.asarray(out["image"])[..., 0]
  label, weight = np.asarray(out["label"]), np.asarray(out["weight"])
  assert set(np.unique(weight)) == {0, 1} and (label[weight == 0] == 0).all()
  pure = (np.abs(image - image.round()) < 1e-5) & (weight == 1)
  assert pure.mean() > 0.2
  np.testing.assert_array_equal(label[pure], image.round()[pure])
  assert (label != batch["label"]).any((1, 2, 3)).all()
