"""Intensity normalisation: the one function of training and prediction.

It sees the whole image, before anything is cropped or padded, so that a crop
has the values that it has at evaluation.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from unet_jax.data.source import Source
from unet_jax.errors import UserError


def fit_normalization(
  source: Source, mode: str, *, clip: Sequence[float] = (), num_threads: int = 8
) -> dict[str, Any]:
  """What `normalize` has to know, fit on the training split.

  For "dataset": mean and standard deviation of each channel over all pixels of
  all images. Each image gives its count, mean and sum of squared deviations;
  they are merged by exactly rounded sums, so order does not matter:

    mean = sum_i n_i m_i / N;  var = sum_i (q_i + n_i (m_i - mean)^2) / N

  For "none" and "image" nothing is read. With two percentiles `clip` images are
  clipped at them before.

  Returns:
    {"mode": mode, "mean": [C] or None, "std": [C] or None}, ready for JSON;
    also {"clip": [low, high]} with `clip`.

  Reference: Chan, Golub, LeVeque 1979, STAN-CS-79-773, equation 2.1.
  """
  also = {"clip": list(clip)} if clip else {}
  if mode != "dataset":
    return {"mode": mode, "mean": None, "std": None, **also}

  def moments_of(index: int) -> tuple[int, np.ndarray, np.ndarray]:
    image = source.image(index)
    return _moments(np.clip(image, *_bounds(image, clip)) if clip else image)

  with futures.ThreadPoolExecutor(num_threads) as pool:
    moments = pool.map(moments_of, range(len(source)))
    counts, means, squares = (np.array(m) for m in zip(*moments, strict=True))
  mean, var = _merge(counts, means, squares)
  std = np.sqrt(var).tolist()
  return {"mode": mode, "mean": mean.tolist(), "std": std, **also}


def normalize(image: np.ndarray, normalization: dict[str, Any]) -> np.ndarray:
  """(image - mean) / std of each channel, float32; a constant one becomes 0.

  The image is whole: uncropped and unpadded. Mode "image" takes mean and std
  over the image's own pixels, "dataset" the given ones; "none" does nothing.
  With "clip" each channel is clipped at its own percentiles before.
  """
  normalization = of_image(normalization, [image])
  if "low" in normalization:
    image = np.clip(image, normalization["low"], normalization["high"])
  if normalization["mode"] == "none":
    return image.astype(np.float32)
  mean, std = np.array(normalization["mean"]), np.array(normalization["std"])
  scale = np.divide(1, std, out=np.zeros_like(std), where=std > 0)
  out = np.empty(image.shape, np.float32)
  for channel in range(image.shape[-1]):
    # The numpy scalars are float64, and so is the difference.
    shifted = image[..., channel] - mean[channel]
    out[..., channel] = shifted * scale[channel]
  return out


def of_image(
  normalization: dict[str, Any], parts: Iterable[np.ndarray]
) -> dict[str, Any]:
  """What a normalization does to an image, of which `parts` are all the pixels.

  Returns:
    What `normalize` takes for each part: mode "none" or "dataset", and with
    "clip" the values "low" and "high" [C] in its place.

  Raises:
    UserError: percentiles of an image in several parts.
  """
  own = {k: v for k, v in normalization.items() if k != "clip"}
  if "clip" in normalization:
    image, *more = itertools.islice(parts, 2)
    if more:
      raise UserError(
        "config.data.clip_percentiles asks for an image whole; set"
        " config.predict.whole_pixels to its pixels"
      )
    own["low"], own["high"] = _bounds(image, normalization["clip"])
    parts = [np.clip(image, own["low"], own["high"])]
  return own | fit_parts(parts) if own["mode"] == "image" else own


def _bounds(image: np.ndarray, clip: Sequence[float]) -> np.ndarray:
  """The two percentiles of each channel, [2, C]."""
  pixels = image.reshape(-1, image.shape[-1])
  return np.percentile(pixels, clip, axis=0).astype(image.dtype)


def fit_parts(parts: Iterable[np.ndarray]) -> dict[str, Any]:
  """What mode "image" does to an image, of which `parts` are all the pixels.

  Merged as in `fit_normalization`, so that no more than a part is in memory.

  Returns:
    {"mode": "dataset", "mean": [C], "std": [C]}, for `normalize` of each part.
  """
  counts, means, squares = zip(*map(_moments, parts), strict=True)
  if len(counts) == 1:  # To the bit what a whole image has.
    mean, var = means[0], squares[0] / counts[0]
  else:
    mean, var = _merge(np.array(counts), np.array(means), np.array(squares))
  return {"mode": "dataset", "mean": mean, "std": np.sqrt(var)}


def _merge(
  counts: np.ndarray, means: np.ndarray, squares: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Mean and variance [C] of all, by the equations of `fit_normalization`."""
  num_pixels = math.fsum(counts)
  mean = _sum(counts[:, None] * means) / num_pixels
  var = _sum(squares + counts[:, None] * (means - mean) ** 2) / num_pixels
  return mean, var


def _moments(image: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
  """Pixel count, mean [C] and sum of squared deviations [C], in float64."""
  means, squares = [], []
  for channel in np.moveaxis(image, -1, 0):
    pixels = channel.astype(np.float64).ravel()
    # Relative to the first pixel, so that a constant image deviates by 0.
    first = pixels[0]
    pixels -= first
    mean = pixels.mean()
    pixels -= mean
    means.append(first + mean)
    squares.append(np.square(pixels, out=pixels).sum())
  return channel.size, np.array(means), np.array(squares)


def _sum(rows: np.ndarray) -> np.ndarray:
  """Exactly rounded sum over the first axis of [N, C]."""
  return np.array([math.fsum(column) for column in rows.T])
