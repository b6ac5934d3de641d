import functools
import warnings

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.metrics
from hypothesis import strategies as st
from scipy import special
from scipy.spatial import distance

from unet_jax.objectives import metrics

count = jax.jit(metrics.confusion, static_argnums=3)


def example(num_logits, shape, seed=0):
  """Random logits, labels and weights; where nothing counts, label 255."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(*shape, num_logits)).astype(np.float32)
  label = rng.integers(0, max(num_logits, 2), shape)
  weight = rng.uniform(0.1, 3, shape) * (rng.uniform(size=shape) > 0.3)
  label = np.where(weight > 0, label, 255).astype(np.int32)
  return logits, label, weight.astype(np.float32)


def loop_confusion(logits, label, weight, num_labels):
  counts = np.zeros((len(label), num_labels, num_labels), np.int64)
  for index in np.ndindex(label.shape):
    pixel = logits[index].tolist()
    best = int(pixel[0] > 0) if len(pixel) == 1 else pixel.index(max(pixel))
    if weight[index] > 0:
      counts[index[0], label[index], best] += 1
  return counts


def test_predict_labels_takes_the_sign_or_the_largest():
  one = metrics.predict_labels(np.float32([[[-1], [0], [1e-9], [1e4]]]))
  three = metrics.predict_labels(
    np.float32([[[0, 2, 1], [-1, -3, -2], [1, 5, 5]]])
  )
  np.testing.assert_array_equal(one, [[0, 0, 1, 1]])
  np.testing.assert_array_equal(three, [[1, 0, 1]])
  assert one.dtype == three.dtype == jnp.int32


def test_probabilities_are_those_of_scipy_and_one_logit_gives_two_classes():
  logits = example(4, (2, 5))[0] * 30
  np.testing.assert_allclose(
    metrics.probabilities(logits), special.softmax(logits, -1), rtol=1e-5
  )
  one = logits[..., :1]
  two = np.concatenate([special.expit(-one), special.expit(one)], -1)
  np.testing.assert_allclose(metrics.probabilities(one), two, rtol=1e-5)


@pytest.mark.parametrize("num_logits", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2, 9), (2, 5, 3), (2, 3, 2, 4)])
def test_confusion_is_that_of_a_loop_over_pixels(num_logits, shape):
  arrays = example(num_logits, shape)
  num_labels = max(num_logits, 2)
  counts = count(*arrays, num_labels)
  assert counts.dtype == jnp.int32
  np.testing.assert_array_equal(counts, loop_confusion(*arrays, num_labels))


def test_confusion_is_the_contingency_table_of_skimage():
  logits, label, weight = example(5, (1, 40, 30))
  label[weight == 0], weight[:] = 0, 1
  table = skimage.metrics.contingency_table(label[0], logits[0].argmax(-1))
  np.testing.assert_array_equal(
    count(logits, label, weight, 5)[0], table.toarray()
  )


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
  junk=st.lists(
    st.tuples(
      st.sampled_from([0.0, 1e38, np.inf, -np.inf, np.nan]),
      st.sampled_from([0, 1, 2, 3, 255, -1, 2**31 - 1, -(2**31)]),
    ),
    min_size=12,
    max_size=12,
  )
)
def test_what_has_weight_0_changes_nothing(junk):
  logits, label, weight = example(3, (1, 12))
  ignored = weight == 0
  assert 0 < ignored.sum() < 12
  junk_logits, junk_label = (
    np.array(column) for column in zip(*junk, strict=True)
  )
  changed = np.where(ignored[..., None], junk_logits[None, :, None], logits)
  changed_label = np.where(ignored, junk_label[None], label)
  np.testing.assert_array_equal(
    count(
      changed.astype(np.float32), changed_label.astype(np.int32), weight, 3
    ),
    loop_confusion(logits, label, weight, 3),
  )


def test_a_label_that_is_no_class_is_counted_nowhere():
  label = np.int32([[0, 1, -1, 2, 255]])
  counts = count(
    np.ones((1, 5, 1), np.float32), label, np.ones((1, 5), np.float32), 2
  )
  np.testing.assert_array_equal(counts, [[[0, 1], [0, 1]]])


def test_confusion_counts_past_2_to_the_24_exactly():
  size = 2**24 + 3
  counts = count(
    jnp.ones((1, size, 1), jnp.bfloat16),
    jnp.ones((1, size), jnp.int32),
    jnp.ones((1, size), jnp.bfloat16),
    2,
  )
  assert int(np.float32(size)) != size
  np.testing.assert_array_equal(counts, [[[0, 0], [0, size]]])


@pytest.mark.parametrize("num_logits", [1, 3])
def test_confusion_of_two_batches_merged_is_that_of_one(num_logits):
  logits, label, weight = example(num_logits, (4, 6, 5))
  valid = np.float32([1, 0, 1, 1])

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def measure(start, stop):
    part = slice(start, stop)
    return metrics.Confusion.from_model_output(
      logits=logits[part],
      label=label[part],
      weight=weight[part],
      valid=valid[part],
      loss=0.0,
    )

  merged = measure(0, 2).merge(measure(2, 4)).compute()
  counts = loop_confusion(logits, label, weight, max(num_logits, 2))
  np.testing.assert_array_equal(merged, counts[[0, 2, 3]].sum(0))
  np.testing.assert_array_equal(merged, measure(0, 4).compute())
  assert merged.dtype == np.int64


def test_confusion_is_summed_over_devices():
  logits, label, weight = example(3, (8, 2, 10))

  def measure(logits, label, weight, valid):
    update = metrics.Confusion.from_model_output(
      logits=logits, label=label, weight=weight, valid=valid
    )
    return jax.lax.all_gather(update, "data").reduce()

  total = jax.jit(jax.vmap(measure, axis_name="data"))(
    logits, label, weight, np.ones((8, 2), np.float32)
  )
  expected = sum(
    loop_confusion(logits[i], label[i], weight[i], 3).sum(0) for i in range(8)
  )
  for counts in np.asarray(total.counts):
    np.testing.assert_array_equal(counts, expected)


def test_pooled_scores_are_those_of_scipy():
  logits, label, weight = example(4, (3, 8, 9))
  label[weight == 0], weight[:] = 0, 1
  predicted = logits.argmax(-1)
  counts = np.asarray(count(logits, label, weight, 4))
  summary = metrics.summarize(counts, ())
  truths = [(label == k).ravel() for k in range(4)]
  guesses = [(predicted == k).ravel() for k in range(4)]
  pairs = list(zip(truths, guesses, strict=True))
  dice = [1 - distance.dice(t, p) for t, p in pairs]
  iou = [1 - distance.jaccard(t, p) for t, p in pairs]
  np.testing.assert_allclose(summary["dice_per_class"], dice)
  np.testing.assert_allclose(summary["iou_per_class"], iou)
  np.testing.assert_allclose(
    summary["precision_per_class"], [t[p].mean() for t, p in pairs]
  )
  np.testing.assert_allclose(
    summary["recall_per_class"], [p[t].mean() for t, p in pairs]
  )
  np.testing.assert_allclose(summary["dice"], np.mean(dice[1:]))
  np.testing.assert_allclose(summary["iou"], np.mean(iou[1:]))
  assert summary["pixel_accuracy"] == (predicted == label).mean()
  assert (summary["num_images"], summary["num_pixels"]) == (3, 3 * 72)


# Worked by hand: L = 4. Image 0 has classes 0 and 1; image 1 has class 2 in the
# prediction alone; image 2 is background, predicted as such. 3 is nowhere.
WORKED = np.zeros((3, 4, 4), np.int64)
WORKED[0, 0, 0], WORKED[0, 1, 1], WORKED[0, 1, 0] = 4, 3, 1
WORKED[1, 0, 0], WORKED[1, 0, 2] = 6, 2
WORKED[2, 0, 0] = 8


def test_absent_classes_are_absent_and_false_ones_count_0():
  nan = float("nan")
  summary = metrics.summarize(WORKED, ())
  np.testing.assert_equal(
    summary,
    {
      "dice": (6 / 7 + 0) / 2,
      "iou": (3 / 4 + 0) / 2,
      "dice_per_class": [36 / 39, 6 / 7, 0.0, nan],
      "iou_per_class": [18 / 21, 3 / 4, 0.0, nan],
      "precision_per_class": [18 / 19, 1.0, 0.0, nan],
      "recall_per_class": [18 / 20, 3 / 4, nan, nan],
      "dice_per_image": (6 / 7 + 0) / 2,
      "iou_per_image": (3 / 4 + 0) / 2,
      "images_without_foreground": 1,
      "pixel_accuracy": 21 / 24,
      "absent_classes": [3],
      "num_images": 3,
      "num_pixels": 24,
    },
  )


def test_foreground_names_the_classes_of_the_means():
  summary = metrics.summarize(WORKED, (0,))
  dice = [8 / 9, 12 / 14, 1.0]
  assert summary["dice"] == 36 / 39
  assert summary["iou"] == 18 / 21
  np.testing.assert_allclose(summary["dice_per_image"], np.mean(dice))
  assert summary["images_without_foreground"] == 0
  rows = metrics.per_image_rows(WORKED, (0,))
  assert [row["dice"] for row in rows] == dice


@pytest.mark.parametrize("counts", [WORKED[:0], WORKED[:2] * 0, WORKED[2:]])
def test_a_mean_of_nothing_is_nan(counts):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    summary = metrics.summarize(counts, ())
  for name in ("dice", "iou", "dice_per_image", "iou_per_image"):
    assert np.isnan(summary[name]), name
  assert summary["images_without_foreground"] == len(counts)
  assert np.isnan(summary["pixel_accuracy"]) == (counts.sum() == 0)


def test_rows_hold_the_scores_of_each_image():
  nan = float("nan")
  rows = metrics.per_image_rows(WORKED.astype(np.int32), ())
  expected = [
    (6 / 7, 3 / 4, 7 / 8, [8 / 9, 6 / 7, nan, nan]),
    (0.0, 0.0, 6 / 8, [12 / 14, nan, 0.0, nan]),
    (nan, nan, 1.0, [1.0, nan, nan, nan]),
  ]
  assert len(rows) == 3
  for row, counts, (dice, iou, accuracy, per_class) in zip(
    rows, WORKED, expected, strict=True
  ):
    wanted = {"dice": dice, "iou": iou, "pixel_accuracy": accuracy, "pixels": 8}
    wanted["foreground_pixels"] = int(counts[1:].sum())
    wanted |= {f"dice_class_{k}": d for k, d in enumerate(per_class)}
    np.testing.assert_equal(row, wanted)


def test_sums_are_exact_where_float32_is_not():
  # 26 images of 1024 x 1024 pixels; each has one wrong pixel.
  image = np.array([[2**20 - 3, 1], [0, 2]], np.int32)
  counts = np.stack([image] * 26)
  in_float32 = np.float32(0)
  for _ in range(26):
    in_float32 += np.float32(image[0, 0])
  assert int(in_float32) != 26 * (2**20 - 3)
  summary = metrics.summarize(counts, ())
  assert summary["num_pixels"] == 26 * 2**20
  assert summary["recall_per_class"][0] == (2**20 - 3) / (2**20 - 2)
  # Counts that leave int32 are no matter either.
  many = metrics.summarize(np.stack([image * 500] * 26), ())
  assert many["num_pixels"] == 26 * 500 * 2**20
  assert many["dice"] == summary["dice"] == 4 / 5
