"""Draws figure 3 of the 2015 paper from any data set: docs/figure3.png.

python docs/figure3.py [--dir DIR --stem STEM]

(a) an image, (b) its objects, (c) the labels that training sees, objects that
touch taken apart, (d) the weight of every pixel, all by the code that trains.
Without --dir a synthetic image. Class weights are those of this one image.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unet_jax import config
from unet_jax.data import balance, pipeline, weight_map
from unet_jax.inspect import pictures
from unet_jax.workdir import with_class_weights

_CELL, _GAP, _TEXT = 320, 12, 15
# From light to heavy: dark blue, purple, orange, yellow, white.
_RAMP = np.array(
  [(8, 16, 60), (110, 20, 120), (230, 90, 40), (250, 210, 70), (255, 255, 245)]
)


class _One:
  """One example of a source."""

  def __init__(self, source: pipeline.Source, index: int):
    self.source, self.index = source, index

  def __len__(self) -> int:
    return 1

  def __getitem__(self, _: int) -> dict[str, np.ndarray]:
    return self.source[self.index]


def main() -> None:
  """Reads the arguments and writes the picture."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--dir", default="", help="as config.data.dir")
  parser.add_argument("--stem", default="", help="of the training split")
  parser.add_argument("--size", type=int, default=160, help="pixels a side")
  parser.add_argument("--output", default="docs/figure3.png")
  args = parser.parse_args()
  raw = config.default_config()
  raw.data.weight_map, raw.data.separate = "instances", True
  raw.data.synthetic_size = (args.size,)
  if args.dir:
    raw.data.source, raw.data.dir = "folder", args.dir
  cfg = config.parse(raw)
  source = pipeline.make_source(cfg, "train", pathlib.Path("/nonexistent"))
  index = source.names.index(args.stem) if args.stem else 0
  counts = balance.fit_class_weights(_One(source, index), cfg.num_labels)
  cfg = with_class_weights(cfg, counts)
  example = weight_map.read(source, index, cfg, None)
  # The loss multiplies by the class weight: together they are the paper's w.
  weight = example["weight"] * np.float32(counts)[example["label"]]
  arrays = (
    pictures.to_rgb(example["image"]),
    source.instances(index),
    example["label"],
    weight,
  )
  draw(*(x[: args.size, : args.size] for x in arrays)).save(args.output)


def draw(
  image: np.ndarray, objects: np.ndarray, label: np.ndarray, weight: np.ndarray
) -> Image.Image:
  """The four panels, with a scale for the last."""
  _, ids = np.unique(objects, return_inverse=True)
  ids = ids.reshape(objects.shape)
  colors = pictures.class_colors(ids.max() + 1)
  masks = np.repeat(np.uint8(255 * (label > 0))[..., None], 3, -1)
  panels = {
    "(a) image": image,
    "(b) objects": pictures.overlay(image, ids, num_labels=len(colors)),
    "(c) labels": masks,
    "(d) weight w": _heat(weight / weight.max()),
  }
  width = 4 * (_CELL + _GAP) + _GAP + 70
  sheet = Image.new("RGB", (width, _CELL + 2 * _GAP + 2 * _TEXT), "white")
  pen = ImageDraw.Draw(sheet)
  pen.font = ImageFont.load_default(size=_TEXT)
  x = _GAP
  for title, pixels in panels.items():
    size = (_CELL, _CELL)
    cell = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
    sheet.paste(cell, (x, _GAP))
    pen.text((x + _CELL / 2, _CELL + 2 * _GAP), title, "black", anchor="mt")
    x += _CELL + _GAP
  bar = _heat(np.linspace(1, 0, _CELL)[:, None].repeat(16, 1))
  sheet.paste(Image.fromarray(bar), (x, _GAP))
  for share in (0, 0.25, 0.5, 0.75, 1):
    y = _GAP + (1 - share) * (_CELL - 1)
    text = f"{share * weight.max():.1f}"
    pen.text((x + 22, y), text, "black", anchor="lm")
  return sheet


def _heat(share: np.ndarray) -> np.ndarray:
  """Colours uint8 [H, W, 3] of values from 0 to 1."""
  at = np.linspace(0, 1, len(_RAMP))
  channels = [np.interp(share, at, channel) for channel in _RAMP.T]
  return np.stack(channels, -1).round().astype(np.uint8)


if __name__ == "__main__":
  main()
