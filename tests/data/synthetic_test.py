"""Synthetic cells: pure in (seed, split, index), too hard for a threshold."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage, stats
from skimage.filters import threshold_otsu

from unet_jax import config
from unet_jax.data.synthetic import SyntheticSource
from unet_jax.errors import UserError


def make(split="train", seed=0, dims=2, **data):
  cfg = config.parse(
    {
      "model": {"dims": dims, "widths": (8, 16)},
      "data": data | {"crop_size": (16,)},
    }
  )
  return SyntheticSource(dataclasses.replace(cfg, seed=seed), split, None)


def test_examples_are_functions_of_seed_split_and_index():
  base = make()
  again = make()
  base[3]  # Reading in another order changes nothing.
  for name, array in again[5].items():
    np.testing.assert_array_equal(array, base[5][name])
  np.testing.assert_array_equal(again.image(5), base[5]["image"])
  others = [base[6], make("val")[5], make("test")[5], make(seed=1)[5]]
  for other in others:
    assert np.abs(other["image"] - base[5]["image"]).mean() > 0.01
  assert len(make(synthetic_train=7)) == 7
  with pytest.raises(IndexError):
    make(synthetic_train=7)[7]


@pytest.mark.parametrize("size", [(8,), (200,), (48, 31), (8, 8), (12, 16, 20)])
@pytest.mark.parametrize("num_classes", [1, 2, 4])
def test_labels_instances_and_ranges_agree(size, num_classes):
  source = make(
    dims=len(size), synthetic_size=size, num_classes=num_classes, channels=3
  )
  kinds = set()
  for i in range(20):
    example = source[i]
    image, label, ids = (example[k] for k in ("image", "label", "instances"))
    assert image.shape == (*size, 3) and image.dtype == np.float32
    assert image.min() >= 0 and image.max() <= 1
    assert label.shape == source.size(i) == size
    assert label.dtype == ids.dtype == np.int32
    assert (example["weight"] == 1).all()
    np.testing.assert_array_equal(label > 0, ids > 0)
    for cell in np.unique(ids):
      assert len(np.unique(label[ids == cell])) == 1
    # Channels are different mixtures, with noise of their own.
    assert np.abs(np.diff(image, axis=-1)).mean() > 0.005
    kinds |= set(np.unique(label))
  assert kinds == set(range(max(num_classes, 2)))


def test_a_threshold_is_not_enough():
  source = make()
  dice = []
  for i in range(40):
    image, truth = source[i]["image"][..., 0], source[i]["label"] > 0
    found = image > threshold_otsu(image)
    dice.append(2 * (found & truth).sum() / (found.sum() + truth.sum()))
    # Still, cells are brighter than what is around them.
    assert image[truth].mean() > image[~truth].mean() + 0.05
  assert 0.6 < np.mean(dice) < 0.85


# --- Texture alone ------------------------------------------------------------


def pooled(similarity, split="test", **data):
  """Images, and which pixels are cell, of a texture."""
  source = make(split, synthetic_texture=similarity, **data)
  examples = [source[i] for i in range(24)]
  images = np.stack([e["image"][..., 0] for e in examples])
  return images, np.stack([e["label"] > 0 for e in examples])


def separation(similarity, split="test", **data):
  """How well the energies of both grains tell cells: area under the ROC."""
  images, truth = pooled(similarity, split, **data)
  smooth = ndimage.gaussian_filter

  def energy(x, fine, coarse):
    return smooth((smooth(x, fine) - smooth(x, coarse)) ** 2, 2.0)

  found = np.stack([energy(x, 2, 4) / energy(x, 1, 2) for x in images])
  around, cell = found[~truth], found[truth]
  test = stats.mannwhitneyu(cell, around)
  return test.statistic / (len(around) * len(cell))


def test_a_texture_shows_in_the_grain_alone():
  for similarity in (0.0, 0.4, 0.7):
    images, truth = pooled(similarity)
    assert abs(images[truth].mean() - images[~truth].mean()) < 0.01
    assert images[truth].std() == pytest.approx(images[~truth].std(), rel=0.05)
    assert 0.2 < truth.mean() < 0.4 and images.min() >= 0 <= images.max() <= 1


def test_a_texture_is_harder_the_more_alike():
  found = [separation(x) for x in (0.0, 0.2, 0.4, 0.6, 0.7)]
  assert found == sorted(found, reverse=True)
  assert found[0] > 0.9 and 0.6 < found[-1] < 0.75
  assert separation(1.0) == pytest.approx(0.5, abs=0.03), "nothing is left"


def test_shifted_has_the_cells_of_test_but_less_of_their_grain():
  data = {"synthetic_shift": 0.3}
  _, test = pooled(0.2, **data)
  _, shifted = pooled(0.2, "shifted", **data)
  np.testing.assert_array_equal(test, shifted)
  # It is what a test split with that similarity would be.
  images, _ = pooled(0.2, "shifted", **data)
  np.testing.assert_array_equal(images, pooled(0.5)[0])
  cfg = config.default_config()
  splits = lambda: SyntheticSource.list_splits(config.parse(cfg), None)
  assert "shifted" not in splits()
  cfg.data.synthetic_texture, cfg.data.synthetic_shift = 0.2, 0.3
  assert splits() == ["train", "val", "test", "shifted"]


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"synthetic_shift": 0.1}, "synthetic_texture too"),
    ({"synthetic_texture": 0.5, "num_classes": 3}, "one kind of cell"),
    ({"synthetic_texture": 1.5}, "too large"),
  ],
)
def test_a_texture_that_means_nothing_is_refused(fields, words):
  with pytest.raises(UserError, match=words):
    make(**fields)
  with pytest.raises(UserError, match=r"needs data\.synthetic_shift"):
    config.parse({"eval": {"split": "shifted"}})
