"""What a study can say: intervals and differences over seeds and images.

A score y[i, j] of seed i on image j is modelled as crossed random effects,

  y[i, j] = mu + seed[i] + image[j] + rest[i, j],

since both seeds and images are samples: another seed and another image would
give another mean. With the mean squares S of seeds, M of images and E of the
rest, the variance of the mean over I seeds and J images is estimated by

  (S + max(M - E, 0)) / (I J),

which counts E with the seeds where it cannot be told apart, and its degrees of
freedom by Satterthwaite's formula. There S enters 1 + 2 / (I - 1) times, the
ratio of its mean square to its squared mean: with few seeds S is often too
small by chance, and the plain formula then trusts it most.

Reference: Satterthwaite 1946, An approximate distribution of estimates of
variance components; Searle, Casella, McCulloch 1992, Variance components,
chapter 4, for the crossed model.
"""

import dataclasses
import math

import numpy as np
from scipy import stats

LEVEL = 0.95
# Measured coverage of `bootstrap`, nominally 95 %, by the number of seeds.
BOOTSTRAP_COVERAGE = {3: 0.79, 5: 0.85, 10: 0.92}

BETTER, WORSE, UNCLEAR = "better", "worse", "no evidence of a difference"
UNKNOWN = "one seed: unknown"


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean and its interval.

  Attributes:
    mean: over seeds and images.
    sd_seeds: standard deviation over seeds of the mean over images; NaN with
      one seed.
    low, high: the 95 % interval; NaN with one seed.
    dof: degrees of freedom of the interval.
    num_seeds, num_images: what it rests on.
  """

  mean: float
  sd_seeds: float
  low: float
  high: float
  dof: float
  num_seeds: int
  num_images: int


@dataclasses.dataclass(frozen=True)
class Difference:
  """An arm less the baseline, on the same seeds and images.

  Attributes:
    estimate: of the difference.
    p: two-sided, of no difference.
    p_holm: the same, corrected for all arms of the study.
    verdict: "better", "worse", "equivalent within +-d", "no evidence of a
      difference", or "one seed: unknown".
  """

  estimate: Estimate
  p: float
  p_holm: float
  verdict: str


def variance_of_mean(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The variance of the mean, and its degrees of freedom.

  Args:
    scores: [..., I, J] of I >= 2 seeds and J images.

  Returns:
    Two arrays [...]. With one image only seeds vary: I - 1 degrees.
  """
  num_seeds, num_images = scores.shape[-2:]
  mean = scores.mean((-2, -1), keepdims=True)
  by_seed = scores.mean(-1, keepdims=True) - mean
  by_image = scores.mean(-2, keepdims=True) - mean
  rest = scores - mean - by_seed - by_image

  def mean_square(x: np.ndarray, times: int, dof: int) -> np.ndarray:
    return times * np.square(x).sum((-2, -1)) / max(dof, 1)

  dof_s, dof_m = num_seeds - 1, num_images - 1
  seeds = mean_square(by_seed, num_images, dof_s)
  images = mean_square(by_image, num_seeds, dof_m)
  error = mean_square(rest, 1, dof_s * dof_m)
  extra = np.maximum(images - error, 0) if num_images > 1 else 0 * seeds
  scaled = (1 + 2 / dof_s) * seeds
  below = np.square(scaled) / dof_s
  if num_images > 1:
    spread = np.square(images) / dof_m + np.square(error) / (dof_s * dof_m)
    below = below + np.where(extra > 0, spread, 0)
  # Where nothing varies, any number of degrees will do.
  above = np.square(scaled + extra)
  dof = np.where(below > 0, above / np.where(below > 0, below, 1), dof_s)
  return (seeds + extra) / (num_seeds * num_images), dof


def summarize(scores: np.ndarray) -> Estimate:
  """The mean of an arm and its 95 % interval.

  Args:
    scores: [seeds, images], all finite.
  """
  num_seeds, num_images = scores.shape
  mean = float(scores.mean())
  if num_seeds < 2:
    nan = math.nan
    return Estimate(mean, nan, nan, nan, nan, num_seeds, num_images)
  variance, dof = (float(x) for x in variance_of_mean(scores))
  half = stats.t.ppf((1 + LEVEL) / 2, dof) * math.sqrt(variance)
  sd = float(scores.mean(1).std(ddof=1))
  ends = mean - half, mean + half
  return Estimate(mean, sd, *ends, dof, num_seeds, num_images)


def compare(
  arms: dict[str, np.ndarray], baseline: str, margin: float
) -> dict[str, Difference]:
  """Each arm against the baseline.

  Args:
    arms: scores [seeds, images] by name, rows and columns of all in the same
      order: runs of one seed share data order and augmentation.
    baseline: a name among them.
    margin: d > 0; differences within +-d do not matter.

  Returns:
    By name, without the baseline. An arm is better or worse where its p after
    Holm's correction is below 5 %; else equivalent where two one-sided tests
    at 5 % reject -d and d.
  """
  others = {k: v for k, v in arms.items() if k != baseline}
  return judge({k: v - arms[baseline] for k, v in others.items()}, margin)


def judge(
  differences: dict[str, np.ndarray], margin: float
) -> dict[str, Difference]:
  """`compare` of arms that share other seeds and images with the baseline.

  Args:
    differences: scores less the baseline's, [seeds, images], by name.
    margin: as in `compare`.
  """
  found = {
    name: (summarize(difference), *_tests(difference, margin))
    for name, difference in differences.items()
  }
  corrected = holm([p for _, p, _ in found.values()])
  return {
    name: Difference(e, p, q, _verdict(e, q, equal, margin))
    for (name, (e, p, equal)), q in zip(found.items(), corrected, strict=True)
  }


def _tests(difference: np.ndarray, margin: float) -> tuple[float, float]:
  """The p of no difference (two-sided), and of one of `margin` or more."""
  if difference.shape[0] < 2:
    return math.nan, math.nan
  variance, dof = (float(x) for x in variance_of_mean(difference))
  mean, error = float(difference.mean()), math.sqrt(variance)
  if error == 0:
    return float(mean == 0), float(abs(mean) >= margin)
  p = 2 * stats.t.sf(abs(mean) / error, dof)
  return float(p), float(stats.t.sf((margin - abs(mean)) / error, dof))


def _verdict(
  estimate: Estimate, p_holm: float, p_equal: float, margin: float
) -> str:
  if estimate.num_seeds < 2:
    return UNKNOWN
  if p_holm < 1 - LEVEL:
    return BETTER if estimate.mean > 0 else WORSE
  if p_equal < 1 - LEVEL:
    return f"equivalent within +-{margin:g}"
  return UNCLEAR


def holm(ps: list[float]) -> list[float]:
  """Holm's step-down correction; NaN stays NaN and counts as no test.

  Reference: Holm 1979, A simple sequentially rejective multiple test procedure.
  """
  order = sorted(
    (i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i]
  )
  corrected, largest = [math.nan] * len(ps), 0.0
  for rank, i in enumerate(order):
    largest = max(largest, min(1.0, (len(order) - rank) * ps[i]))
    corrected[i] = largest
  return corrected


def bootstrap(
  scores: np.ndarray, seed: int = 0, num_samples: int = 2000
) -> tuple[float, float]:
  """The hierarchical percentile bootstrap: seeds, then images, drawn anew.

  For comparison alone: with few seeds it covers too little, see
  BOOTSTRAP_COVERAGE.

  Args:
    scores: [seeds, images].
    seed: of the resampling.
    num_samples: drawn.

  Returns:
    The ends of the nominal 95 % interval.
  """
  rng = np.random.default_rng(seed)
  seeds, images = scores.shape
  rows = rng.integers(seeds, size=(num_samples, seeds))
  columns = rng.integers(images, size=(num_samples, images))
  means = [
    scores[np.ix_(r, c)].mean() for r, c in zip(rows, columns, strict=True)
  ]
  tail = (1 - LEVEL) / 2
  low, high = np.quantile(means, [tail, 1 - tail])
  return float(low), float(high)


def smallest_sign_flip_p(num_seeds: int) -> float:
  """The smallest two-sided p that flipping signs of so many seeds can give."""
  return 2.0 ** (1 - num_seeds)
