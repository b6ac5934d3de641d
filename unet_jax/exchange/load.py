"""Loads what `--mode export` wrote; needs jax, flatbuffers and numpy alone.

mask, probability = load("export")(image): an image float32 [*S, C] of any size
(8-bit files: v / 255) to class ids uint8 [*S] and probabilities [*S, K].
"""

import hashlib
import io
import json
import pathlib

import jax
import jax.export
import numpy as np


def load(folder):
  """The exported network as a function of one image."""
  folder = pathlib.Path(folder)
  manifest = json.loads((folder / "manifest.json").read_text())
  data = (folder / "model.npz").read_bytes()
  if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
    raise ValueError(f"{folder}/model.npz is damaged: export it again")
  arrays, size = dict(np.load(io.BytesIO(data))), manifest["size"]
  program = jax.export.deserialize(bytearray(arrays.pop("program").tobytes()))
  call, weights = jax.jit(program.call), jax.device_put(arrays)

  def predict(image):
    affine, padded = as_float32(*moments(image, manifest)), image
    for axis, n in enumerate(image.shape[:-1]):  # Mirrored: 2 1 0 1 2 1 0 ...
      want = -(-n // size["step"]) * size["step"] + 2 * size["before"]
      want = max(-(-(want + size["less"]) // size["unit"]), size["least"])
      i = np.arange(want * size["unit"] - size["less"]) - size["before"]
      i = n - 1 - abs(i % max(2 * (n - 1), 1) - (n - 1))
      padded = padded.take(i, axis)
    window = tuple(slice(0, n) for n in image.shape[:-1])
    both = call(weights, padded[None].astype(np.float32), affine)
    return tuple(np.asarray(array)[0][window] for array in both)

  return predict


def moments(image, manifest):
  """Mean and standard deviation of each channel in float64, as in training."""
  kind, c = manifest["normalization"], image.shape[-1]
  if kind["mode"] != "image":
    fitted = kind["mean"] or [0.0] * c, kind["std"] or [1.0] * c
    return tuple(map(np.array, fitted))
  pixels = image.reshape(-1, c).astype(np.float64).T.copy()
  first = pixels[:, :1].copy()
  pixels -= first
  mean = np.array([row.mean() for row in pixels])
  pixels -= mean[:, None]
  squares = np.array([np.square(row).sum() for row in pixels])
  return first[:, 0] + mean, np.sqrt(squares / pixels.shape[1])


def as_float32(mean, std):
  """[1, 2, 3, C]: mean and 1 / std (0 for 0), as sums of three float32."""
  rest = np.stack([mean, np.divide(1, std, out=0 * std, where=std > 0)])
  parts = []
  for _ in range(3):
    parts.append(rest.astype(np.float32))
    rest = rest - parts[-1]
  return np.stack(parts, 1)[None]
