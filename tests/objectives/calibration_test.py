"""Confidence against accuracy: closed forms and a loop."""

import numpy as np

from unet_jax.objectives import calibration


def test_a_network_that_is_right_as_often_as_it_says_has_no_error():
  probability = np.tile(np.float32([0.25, 0.75]), (400, 1))
  label = np.arange(400) % 4 > 0  # Right 3 times in 4.
  everywhere = np.ones(400, bool)
  bins = calibration.bin_confidence(probability, label, everywhere)
  assert calibration.expected_error(bins) == 0
  wrong = calibration.bin_confidence(probability, ~label, everywhere)
  assert calibration.expected_error(wrong) == 0.5
  # Over both, bins are added: right in half of all, sure of 3/4.
  assert calibration.expected_error(bins + wrong) == 0.25


def test_bins_are_those_of_a_loop():
  rng = np.random.default_rng(0)
  probability = rng.dirichlet((0.5, 0.5, 0.5), (20, 30)).astype(np.float32)
  label = rng.integers(0, 3, (20, 30))
  counted = rng.random((20, 30)) < 0.8
  expected = np.zeros((calibration.NUM_BINS, 3))
  for at in np.ndindex(label.shape):
    if counted[at]:
      values = probability[at].tolist()
      confidence = max(values)
      # The bin (m, m + 1] / 15 that holds it.
      (m,) = [m for m in range(15) if m < confidence * 15 <= m + 1]
      right = values.index(confidence) == label[at]
      expected[m] += [1, confidence, right]
  bins = calibration.bin_confidence(probability, label, counted)
  np.testing.assert_allclose(bins, expected, rtol=1e-12)
  n = counted.sum()
  ece = sum(
    row[0] / n * abs(row[2] / row[0] - row[1] / row[0])
    for row in expected
    if row[0]
  )
  np.testing.assert_allclose(calibration.expected_error(bins), ece)


def test_what_does_not_count_and_nothing_at_all():
  probability = np.float32([[0.1, 0.9], [np.nan, np.nan]])
  label, counted = np.int32([1, 255]), np.bool_([True, False])
  bins = calibration.bin_confidence(probability, label, counted)
  assert bins[:, 0].sum() == 1
  np.testing.assert_allclose(calibration.expected_error(bins), 0.1, rtol=1e-6)
  nothing = calibration.bin_confidence(probability, label, counted & False)
  assert not nothing.any()
  assert np.isnan(calibration.expected_error(nothing))


def test_certainty_is_in_the_last_bin_and_a_tie_is_the_smaller_class():
  probability = np.float32([[1, 0], [0.5, 0.5]])
  bins = calibration.bin_confidence(
    probability, np.int32([0, 0]), np.ones(2, bool)
  )
  np.testing.assert_array_equal(bins[-1], [1, 1, 1])
  np.testing.assert_array_equal(bins[7], [1, 0.5, 1])
