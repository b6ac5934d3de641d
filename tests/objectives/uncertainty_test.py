"""Uncertainty against its definitions, AURC against adding it up."""

import math

import numpy as np
import pytest
from scipy import stats

from unet_jax.objectives import uncertainty


def test_entropy_is_scipys():
  rng = np.random.default_rng(0)
  p = rng.dirichlet((0.3,) * 4, size=(5, 6))
  p[0, 0] = (1, 0, 0, 0)
  np.testing.assert_allclose(
    uncertainty.entropy(p), stats.entropy(p, axis=-1), atol=1e-12
  )
  one = p[..., :1]
  both = np.concatenate([one, 1 - one], -1)
  np.testing.assert_allclose(
    uncertainty.entropy(one), stats.entropy(both, axis=-1), atol=1e-12
  )
  even = uncertainty.entropy(np.full((1, 4), 0.25))
  assert even == pytest.approx(uncertainty.highest(4))


def test_mutual_information_is_the_mean_divergence_from_the_mean():
  """And 0 where all members say the same, however unsure they are."""
  rng = np.random.default_rng(0)
  p = rng.dirichlet((0.5,) * 3, size=(4, 7))
  mean = np.broadcast_to(p.mean(0), p.shape)
  expected = stats.entropy(p, mean, axis=-1).mean(0)
  found = uncertainty.mutual_information(p)
  np.testing.assert_allclose(found, expected, atol=1e-12)
  same = np.full((4, 7, 1), 0.5)
  assert uncertainty.mutual_information(same).max() < 1e-12
  disagree = np.array([0.0, 1.0]).reshape(2, 1, 1)
  assert uncertainty.mutual_information(disagree) == pytest.approx(math.log(2))


def add_up(errors):
  """The mean of the error rates among the first 1, 2, ..., N."""
  return np.mean(np.cumsum(errors) / np.arange(1, len(errors) + 1))


def test_risk_coverage_one_by_one():
  rng = np.random.default_rng(0)
  unsure, errors = rng.random(200), rng.random(200) < 0.3
  found = uncertainty.risk_coverage(unsure, errors)
  assert found["aurc"] == pytest.approx(add_up(errors[np.argsort(unsure)]))
  assert found["aurc_best"] == pytest.approx(add_up(np.sort(errors)))
  assert found["risk"] == errors.mean()
  assert found["aurc_best"] < found["aurc"]
  best = uncertainty.risk_coverage(errors.astype(float), errors)
  assert best["aurc"] == pytest.approx(best["aurc_best"])


def test_equally_sure_pixels_come_mixed():
  """Against the mean over many orders of the same pixels."""
  rng = np.random.default_rng(0)
  wrong, counts = np.array([1, 6, 4]), np.array([20, 15, 9])
  found = uncertainty.risk_coverage(np.array([0.1, 0.5, 0.2]), wrong, counts)
  areas = []
  for _ in range(4000):
    groups = [
      rng.permutation(np.arange(counts[g]) < wrong[g]) for g in (0, 2, 1)
    ]
    areas.append(add_up(np.concatenate(groups)))
  margin = 4 * np.std(areas) / math.sqrt(len(areas))
  assert abs(found["aurc"] - np.mean(areas)) < margin
  alone = uncertainty.risk_coverage(np.zeros(1), [7], [20])
  assert alone["aurc"] == pytest.approx(alone["risk"]) == pytest.approx(0.35)
