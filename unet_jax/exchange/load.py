"""Loads what `--mode export` wrote; needs jax, flatbuffers and numpy alone.

mask, probability = load("export")(image): an image float32 [*S, C] of any size
(8-bit files: v / 255) to class ids uint8 [*S] and probabilities [*S, K].
"""

import hashlib
import io
import json
import pathlib

import jax.export
import numpy as np


def load(folder):
  """The exported network as a function of one image."""
  manifest = json.loads((pathlib.Path(folder) / "manifest.json").read_text())
  data = (pathlib.Path(folder) / "model.npz").read_bytes()
  if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
    raise ValueError(f"{folder}/model.npz is damaged: export it again")
  weights, size = dict(np.load(io.BytesIO(data))), manifest["size"]
  program = jax.export.deserialize(bytearray(weights.pop("program").tobytes()))
  call, weights = jax.jit(program.call), jax.device_put(weights)

  def predict(image):
    affine, padded = normalization(image, **manifest["normalization"]), image
    for axis, n in enumerate(image.shape[:-1]):  # Mirrored: 2 1 0 1 2 1 0 ...
      want = -(-n // size["step"]) * size["step"] + 2 * size["before"]
      want = max(-(-(want + size["less"]) // size["unit"]), size["least"])
      i = np.arange(want * size["unit"] - size["less"]) - size["before"]
      i = n - 1 - abs(i % max(2 * (n - 1), 1) - (n - 1))
      padded = padded.take(i, axis)
    both = call(weights, padded[None].astype(np.float32), affine)
    inside = tuple(map(slice, image.shape[:-1]))
    return tuple(np.asarray(array)[0][inside] for array in both)

  return predict


def normalization(image, mode, mean, std):
  """[1, 2, 3, C]: mean and 1 / std (0 for 0), as sums of three float32."""
  pixels = image.reshape(-1, image.shape[-1]).T.astype(np.float64, order="C")
  if mode == "image":
    first = pixels[:, :1].copy()
    pixels -= first
    mean = np.array([row.mean() for row in pixels])
    pixels -= mean[:, None]
    std = np.sqrt([np.square(row).sum() / row.size for row in pixels])
    mean = first[:, 0] + mean
  elif mode == "none":
    mean, std = 0 * pixels[:, 0], 0 * pixels[:, 0] + 1
  scale = np.divide(1, std, out=np.zeros(len(pixels)), where=np.array(std) > 0)
  rest, parts = np.stack([mean, scale]), []
  for _ in range(3):
    parts.append(rest.astype(np.float32))
    rest = rest - parts[-1]
  return np.stack(parts, 1)[None]
