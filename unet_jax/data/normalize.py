"""Intensity normalisation: the one function of training and prediction.

It sees the whole image, before anything is cropped or padded, so that a crop
has the values that it has at evaluation.
"""

import math
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import numpy as np

from unet_jax.data.source import Source


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
  moments_of = lambda i: _moments(_clip(source.image(i), also))
  with futures.ThreadPoolExecutor(num_threads) as pool:
    moments = pool.map(moments_of, range(len(source)))
    counts, means, squares = (np.array(m) for m in zip(*moments, strict=True))
  num_pixels = math.fsum(counts)
  mean = _sum(counts[:, None] * means) / num_pixels
  var = _sum(squares + counts[:, None] * (means - mean) ** 2) / num_pixels
  std = np.sqrt(var).tolist()
  return {"mode": mode, "mean": mean.tolist(), "std": std, **also}


def normalize(image: np.ndarray, normalization: dict[str, Any]) -> np.ndarray:
  """(image - mean) / std of each channel, float32; a constant one becomes 0.

  The image is whole: uncropped and unpadded. Mode "image" takes mean and std
  over the image's own pixels, "dataset" the given ones; "none" does nothing.
  With "clip" each channel is clipped at its own percentiles before.
  """
  image = _clip(image, normalization)
  mode = normalization["mode"]
  if mode == "none":
    return image.astype(np.float32)
  if mode == "image":
    count, mean, squares = _moments(image)
    std = np.sqrt(squares / count)
  else:
    mean, std = np.array(normalization["mean"]), np.array(normalization["std"])
  scale = np.divide(1, std, out=np.zeros_like(std), where=std > 0)
  out = np.empty(image.shape, np.float32)
  for channel in range(image.shape[-1]):
    # The numpy scalars are float64, and so is the difference.
    shifted = image[..., channel] - mean[channel]
    out[..., channel] = shifted * scale[channel]
  return out


def _clip(image: np.ndarray, normalization: dict[str, Any]) -> np.ndarray:
  """Values of a channel beyond its two percentiles become them."""
  if "clip" not in normalization:
    return image
  pixels = image.reshape(-1, image.shape[-1])
  low, high = np.percentile(pixels, normalization["clip"], axis=0)
  return np.clip(image, low.astype(image.dtype), high.astype(image.dtype))


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
