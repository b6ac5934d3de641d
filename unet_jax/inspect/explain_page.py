"""The pictures of `inspect.explain`: a sheet an image, and a page of all."""

import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unet_jax.config import Config
from unet_jax.inspect import pages, pictures
from unet_jax.runtime import writers

# Pixels: a cell's picture, its caption, the margin; cells a row.
_CELL, _CAPTION, _GAP, _COLUMNS = 240, 36, 8, 5
# From loss to gain, through white; and from nothing to much.
_SIGNED = np.array([[5, 48, 97], [255, 255, 255], [178, 24, 43]], float)
_PLAIN = np.array([[0, 0, 4], [120, 28, 109], [237, 105, 37], [252, 255, 164]])


def heat(values: np.ndarray) -> tuple[np.ndarray, float]:
  """A map [H, W] in colours, uint8 [H, W, 3], and the value at full colour.

  With a negative value blue is below 0, white 0, red above it; else black is 0
  and yellow the largest.
  """
  values = np.nan_to_num(np.asarray(values, np.float64))
  most, colors = np.abs(values).max(), _PLAIN
  if (values < 0).any():  # Single pixels would leave all others pale.
    most, colors = np.percentile(np.abs(values), 99) or most, _SIGNED
  most = float(most)
  scaled = np.clip(values / (most or 1.0), -1, 1)
  if colors is _SIGNED:
    scaled = (scaled + 1) / 2
  at = np.linspace(0, 1, len(colors))
  channels = [np.interp(scaled, at, colors[:, i]) for i in range(3)]
  return np.round(np.stack(channels, -1)).astype(np.uint8), most


def flat(values: np.ndarray, dims: int, point: Sequence[int]) -> np.ndarray:
  """As a picture: a volume's slice through `point`, a signal as a bar.

  The slice is that across the shortest axis.
  """
  if dims == 3:
    axis = int(np.argmin(values.shape[:3]))
    return values.take(point[axis], axis)
  if dims == 1:
    return np.repeat(values[None], max(len(values) // 8, 1), axis=0)
  return values


def draw(
  image: np.ndarray,
  mask: np.ndarray,
  maps: Mapping[str, np.ndarray],
  point: Sequence[int],
  cfg: Config,
) -> Image.Image:
  """The sheet of one image: input, prediction, and every map by its title."""
  dims = cfg.model.dims
  shown = flat(image, dims, point)
  label = flat(mask, dims, point)
  tinted = pictures.overlay(shown, label, num_labels=cfg.num_labels)
  cells = [("input", pictures.to_rgb(shown)), ("prediction", tinted)]
  for title, values in maps.items():
    colors, most = heat(flat(values, dims, point))
    cells.append((f"{title}\nfull colour: {most:.3g}", colors))
  rows, step = -(-len(cells) // _COLUMNS), _CELL + _GAP
  # Rows are as high as the highest cell: a signal's are low.
  shape = cells[0][1].shape
  high = round(shape[0] * _CELL / max(shape[:2])) + _GAP + _CAPTION
  size = (_GAP + _COLUMNS * step, _GAP + rows * high)
  sheet = Image.new("RGB", size, "white")
  pen = ImageDraw.Draw(sheet)
  font = ImageFont.load_default(size=13)
  for i, (title, colors) in enumerate(cells):
    x = _GAP + i % _COLUMNS * step
    y = _GAP + i // _COLUMNS * high
    pen.multiline_text((x, y), title, (40, 40, 40), font=font, spacing=2)
    factor = _CELL / max(colors.shape[:2])
    wide = tuple(max(round(n * factor), 1) for n in colors.shape[1::-1])
    resize = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX
    cell = Image.fromarray(colors).resize(wide, resize)
    sheet.paste(cell, (x, y + _CAPTION))
    pen.rectangle(
      (x - 1, y + _CAPTION - 1, x + wide[0], y + _CAPTION + wide[1]),
      outline=(208, 208, 208),
    )
  return sheet


def save(path: pathlib.Path, sheet: Image.Image) -> None:
  """Writes the sheet."""
  pictures.save_png(path, sheet)


def write_index(
  folder: pathlib.Path, records: Sequence[dict[str, Any]]
) -> None:
  """index.html: all sheets, one below the other, with their first numbers."""
  parts = []
  for record in records:
    name = html.escape(record["image"])
    parts.append(
      f"<h2>{name}</h2><p>class {record['class']}, mean log odds"
      f" {record['score']:.3f}, {html.escape(record['part'])}</p>"
      f'<img src="{name}.png" alt="Explanations of {name}">'
    )
  template = pathlib.Path(__file__).with_name("explain.html")
  text = pages.fill(template, {"images": "\n".join(parts)})
  writers.write_atomically(folder / "index.html", text.encode())
