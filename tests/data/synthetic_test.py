"""Synthetic cells: pure in (seed, split, index), too hard for a threshold."""

import dataclasses

import numpy as np
import pytest
from skimage.filters import threshold_otsu

from unet_jax import config
from unet_jax.data.synthetic import SyntheticSource


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
