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
  weights = dict(np.load(io.BytesIO(data)))
  program = jax.export.deserialize(bytearray(weights.pop("program").tobytes()))
  call, weights = jax.jit(program.call), jax.device_put(weights)

  def predict(image):
    padded, size = image.astype(np.float32), image.shape[:-1]
    for axis, (n, rule) in enumerate(zip(size, manifest["axes"], strict=True)):
      want = -(-n // rule["step"]) * rule["step"] + 2 * rule["before"]
      want = max(-(-(want + rule["less"]) // rule["unit"]), rule["least"])
      i = np.arange(want * rule["unit"] - rule["less"]) - rule["before"]
      i = n - 1 - abs(i % max(2 * (n - 1), 1) - (n - 1))  # 2 1 0 1 2 1 0 ...
      padded = padded.take(i, axis)
    mask, probability = call(weights, padded[None], np.array([size], np.int32))
    inside = (0, *map(slice, size))
    return np.asarray(mask)[inside], np.asarray(probability)[inside]

  return predict
