"""Pairs that belong together are found, and chance ones are not."""

import csv
import pathlib

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from unet_jax.data import leaks


def picture(seed, size=(128, 128), grain=0.02):
  """Blobs of two sizes on a slope, with grain: like a micrograph."""
  rng = np.random.default_rng(seed)
  fine = ndimage.gaussian_filter(rng.normal(size=size), 2)
  coarse = ndimage.gaussian_filter(rng.normal(size=size), 8)
  light = np.linspace(0, 0.5, size[0])[:, None]
  image = 2 * fine + 4 * coarse + light + grain * rng.normal(size=size)
  return image.astype(np.float32)[..., None]


def find(*images):
  pairs = leaks.find_pairs([leaks.fingerprint(x) for x in images])
  return {(p.first, p.second, p.kind) for p in pairs}


def test_copies_are_identical_whatever_lies_between():
  a, b = picture(0), picture(1)
  assert find(a, b, a.copy(), a.copy()) == {
    (0, 2, "identical"),
    (0, 3, "identical"),
  }
  assert find(a, a.reshape(64, 256, 1)) == set()


@pytest.mark.parametrize("seed", range(3))
def test_adjacent_crops_of_one_picture_are_found_and_no_others(seed):
  whole, n = picture(seed, (512, 768)), 256
  tiles = [whole[:n, :n], whole[:n, n : 2 * n], whole[:n, 2 * n :]]
  tiles += [whole[n:, :n], whole[n:, 2 * n :]]
  others = [picture(100 * seed + i + 10, (n, n)) for i in range(20)]
  found = find(*tiles, *others)
  assert found == {(i, j, "adjacent") for i, j in ((0, 1), (1, 2), (0, 3))} | {
    (2, 4, "adjacent")
  }


def test_a_gap_between_tiles_is_not_adjacent():
  whole = picture(0, (128, 300))
  assert find(whole[:, :128], whole[:, 150:278]) == set()


def test_no_alarm_on_independent_images():
  flat = [np.full((64, 64, 1), v, np.float32) for v in (0, 0.5)]
  rng = np.random.default_rng(0)
  noise = [rng.normal(size=(64, 64, 3)).astype(np.float32) for _ in range(30)]
  assert find(*flat, *noise) == set()
  assert find(*(picture(i, (96, 96)) for i in range(150))) == set()


def test_a_changed_copy_is_similar():
  others = [picture(i) for i in range(1, 30)]
  image = picture(0)
  brighter = 0.5 * image + 0.3 + picture(99, grain=0) * 0.05
  shifted = np.roll(image, 1, 0)
  found = find(image, *others, brighter, shifted)
  assert found == {(0, 30, "similar"), (0, 31, "similar"), (30, 31, "similar")}


def test_what_all_images_share_does_not_make_them_similar():
  face = 0.7 * picture(0, grain=0)
  assert find(*(face + picture(i) for i in range(1, 40))) == set()


def test_volumes_and_signals():
  volume = np.moveaxis(picture(0, (70, 70)), -1, 0)[None] + np.zeros(
    (5, 1, 1, 1)
  )
  volume = volume.reshape(5, 70, 70, 1).astype(np.float32)
  signal = picture(0).reshape(-1, 1)
  assert find(volume, signal, 2 * volume, signal) == {
    (0, 2, "similar"),
    (1, 3, "identical"),
  }


def test_groups_are_the_connected_ones():
  pairs = [
    leaks.Pair("similar", a, b, 1.0) for a, b in ((4, 1), (2, 4), (0, 5))
  ]
  assert leaks.group(7, pairs) == [[0, 5], [1, 2, 4], [3], [6]]


def test_tiles_of_dsb2018_are_of_one_field(data_root):
  root = data_root / "dsb2018"
  with open(root / "index.csv") as file:
    rows = list(csv.DictReader(file))
  prints = []
  for row in rows:
    path = pathlib.Path(root / "images" / f"{row['stem']}.png")
    image = np.asarray(Image.open(path).convert("RGB"), np.float32) / 255
    prints.append(leaks.fingerprint(image))
  pairs = leaks.find_pairs(prints)
  groups = [row["field_group"] for row in rows]
  assert len(pairs) >= 55
  assert all(groups[p.first] == groups[p.second] for p in pairs)


def test_slices_of_isbi2012_are_neighbours(data_root):
  paths = sorted((data_root / "isbi2012" / "images").iterdir())
  images = [np.asarray(Image.open(p), np.float32)[..., None] for p in paths]
  found = find(*images)
  assert len(found) >= 15
  assert all(b - a <= 2 and kind == "similar" for a, b, kind in found)
