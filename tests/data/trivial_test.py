"""Predictors without a network, against counts by hand and scikit-image."""

import numpy as np
import pytest
from skimage import filters

from unet_jax.data.trivial import Baselines, otsu


def example(label, image=None, weight=None):
  label = np.asarray(label)
  image = label if image is None else np.asarray(image)
  weight = np.ones(label.shape) if weight is None else np.asarray(weight)
  return image[..., None].astype(np.float32), label, weight.astype(np.float32)


def summarize(train, val, num_labels=2, foreground=()):
  baselines = Baselines(num_labels, [x[1].shape for x in train], foreground)
  for one in train:
    baselines.add(*one)
  return baselines.summarize([baselines.score(*one) for one in val])


@pytest.mark.parametrize("seed", range(5))
def test_otsu_is_scikit_images(seed):
  rng = np.random.default_rng(seed)
  values = np.concatenate([rng.normal(0, 1, 500), rng.normal(4, 2, 300)])
  assert otsu(values) == pytest.approx(filters.threshold_otsu(values))


def test_majority_class_by_hand():
  train = [example([[0, 1, 1, 1]]), example([[1, 1, 0, 0]])]  # 5 ones, 3 zeros.
  val = [example([[0, 0, 0, 1]]), example([[1, 1, 1, 1]])]
  scores = summarize(train, val)["majority class"]
  # All is 1: 5 of 8 right, dice 2*5 / (5 + 8).
  assert scores["predicts"] == "1 everywhere"
  assert scores["pixel_accuracy"] == 5 / 8
  assert scores["dice"] == pytest.approx(10 / 13)
  assert scores["iou"] == pytest.approx(5 / 8)
  assert scores["dice_per_image"] == pytest.approx((2 / 5 + 1) / 2)


def test_threshold_takes_the_polarity_and_classes_of_train():
  dark = [[0.1, 0.2, 0.9, 0.8]]
  train = [example([[2, 2, 0, 0]], dark, [[1, 1, 1, 1]])]
  val = [example([[2, 0, 0, 2]], dark, [[1, 1, 1, 0]])]
  scores = summarize(train, val, num_labels=3, foreground=(2,))["threshold"]
  assert scores["predicts"].startswith("2 where dark, 0 where bright")
  # Counted: 2 0 0 against 2 2 0.
  assert scores["dice"] == pytest.approx(2 / 3)
  assert scores["num_pixels"] == 3


def test_location_prior_is_the_most_frequent_class_of_a_place():
  rng = np.random.default_rng(0)
  train = [example(rng.integers(0, 3, (5, 6))) for _ in range(9)]
  val = [example(rng.integers(0, 3, (5, 6))) for _ in range(4)]
  counts = sum(np.eye(3)[label] for _, label, _ in train)
  predicted = counts.argmax(-1)
  right = np.mean([predicted == label for _, label, _ in val])
  scores = summarize(train, val, num_labels=3)["location prior"]
  assert scores["pixel_accuracy"] == pytest.approx(right)
  # At another size it is the same picture.
  large = [example(np.kron(label, np.ones((2, 2), int))) for _, label, _ in val]
  scores = summarize(train, large, num_labels=3)["location prior"]
  assert scores["pixel_accuracy"] == pytest.approx(right)


def test_pixels_of_weight_0_teach_nothing():
  train = [example([[1, 1, 0]], weight=[[0, 0, 1]])]
  scores = summarize(train, [example([[1, 1, 0]])])
  assert scores["majority class"]["predicts"] == "0 everywhere"
  assert scores["location prior"]["pixel_accuracy"] == 1 / 3


def test_words_get_their_most_frequent_class():
  def sentence(words, tags):
    image = np.asarray(words, np.int32)[:, None]
    return image, np.asarray(tags), np.ones(len(tags))

  train = [sentence([1, 2, 2, 3], [0, 1, 2, 2]), sentence([2, 3], [1, 2])]
  # 1 -> 0, 2 -> 1, 3 -> 2; 4 and 9 were never seen: 2, the most frequent one.
  val = [sentence([1, 2, 3, 4, 9], [0, 1, 1, 2, 0])]
  scores = summarize(train, val, num_labels=3)
  assert "threshold" not in scores
  assert scores["word"]["pixel_accuracy"] == 3 / 5
