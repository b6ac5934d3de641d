"""Pictures of examples and predictions, drawn with NumPy and Pillow alone.

The arrays are one example, without a batch axis: image [*S, C] of any range,
label and prediction [*S] class ids, weight [*S] with 0 where nothing counts.
"""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from unet_jax.runtime import writers

# Orange, sky blue, green, yellow, blue, vermillion, purple: told apart by
# colour-blind readers. See `class_colors`.
_HEX = "#e69f00 #56b4e9 #009e73 #f0e442 #0072b2 #d55e00 #cc79a7"
_PALETTE = tuple(ImageColor.getrgb(color) for color in _HEX.split())
_, _SKY, _GREEN, _YELLOW, _BLUE, _VERMILLION, _PURPLE = _PALETTE
_DARK, _INK, _LIGHT = (24, 24, 24), (40, 40, 40), (208, 208, 208)
_HATCH = ((96, 96, 96), (150, 150, 150))
# What became of a pixel, in the order of the codes of `error_map`.
_ERRORS = {
  "background": _DARK,
  "correct": _LIGHT,
  "missed": _SKY,
  "invented": _VERMILLION,
  "wrong class": _YELLOW,
}
# Pixels: the longest side of a drawn image, a margin, a letter, a text line.
_CELL, _GAP, _TEXT, _LINE = 256, 8, 14, 22
_WIDTH = 4 * (_CELL + _GAP) + _GAP
_NEAREST, _BOX = Image.Resampling.NEAREST, Image.Resampling.BOX


def class_colors(num_labels: int) -> np.ndarray:
  """One colour a class, uint8 [num_labels, 3]; class 0 is black.

  Classes beyond the seventh have lighter and darker shades of the palette.

  Reference: Okabe & Ito 2008, https://jfly.uni-koeln.de/color/
  """
  colors = np.zeros((num_labels, 3), np.uint8)
  for i in range(num_labels - 1):
    cycle, place = divmod(i, len(_PALETTE))
    # Multiples of the golden ratio, modulo 1, neither crowd nor repeat.
    shade = 0.7 * (cycle * 0.618034 % 1)
    target = 255.0 if cycle % 2 else 0.0
    colors[i + 1] = np.array(_PALETTE[place]) * (1 - shade) + target * shade
  return colors


def to_rgb(image: np.ndarray) -> np.ndarray:
  """Stretches the percentiles 1..99 of [H, W, C] to 0..255, uint8 [H, W, 3].

  One channel is grey, two are red and green, three and more show the first
  three. A constant image is mid grey; NaN and infinities are black.
  """
  image = np.asarray(image, np.float64)
  finite = np.isfinite(image)
  values = image[finite] if finite.any() else np.zeros(1)
  low, high = np.percentile(values, (1, 99))
  if high <= low:  # A few bright pixels on a flat ground.
    low, high = values.min(), values.max()
  scaled = np.full(image.shape, 0.5)
  if high > low:
    scaled = np.clip((np.where(finite, image, low) - low) / (high - low), 0, 1)
  pixels = np.round(255 * scaled * finite).astype(np.uint8)
  if image.shape[-1] == 1:
    return np.repeat(pixels, 3, axis=-1)
  rgb = np.zeros((*image.shape[:-1], 3), np.uint8)
  rgb[..., : image.shape[-1]] = pixels[..., :3]
  return rgb


def overlay(
  image: np.ndarray, label: np.ndarray, *, alpha: float = 0.45, num_labels: int
) -> np.ndarray:
  """An image tinted by class, with a line around each region: uint8 [H, W, 3].

  Args:
    image: float [H, W, C], or uint8 [H, W, 3] that is drawn as it is.
    label: int [H, W]; background, and ids from `num_labels` on, stay clear.
    alpha: opacity of the tint; the line, the rim of a region, is opaque.
    num_labels: number of classes, background included.
  """
  drawn = image.dtype == np.uint8 and image.shape[-1] == 3
  rgb = image if drawn else to_rgb(image)
  label = np.where((label > 0) & (label < num_labels), label, 0)
  wide = np.pad(label, 1, mode="edge")
  sides = wide[2:, 1:-1], wide[:-2, 1:-1], wide[1:-1, 2:], wide[1:-1, :-2]
  rim = np.any([side != label for side in sides], axis=0)
  opacity = (np.where(rim, 1.0, alpha) * (label > 0))[..., None]
  mixed = (1 - opacity) * rgb + opacity * class_colors(num_labels)[label]
  return np.round(mixed).astype(np.uint8)


def slices(
  image: np.ndarray, label: np.ndarray, *, num_labels: int
) -> np.ndarray:
  """The middle slices of a volume across its axes, image above overlay.

  Args:
    image: float [X, Y, Z, C].
    label: int [X, Y, Z].
    num_labels: as of `overlay`.

  Returns:
    uint8 [H, W, 3], titles included. The last axis of a slice runs up, as
    anatomists draw volumes that run to the right, to the front and up.
  """
  cuts = [
    tuple(np.take(x, n // 2, axis) for x in (image, label))
    for axis, n in enumerate(label.shape)
  ]
  return draw_slices(cuts, label.shape, num_labels=num_labels)


def draw_slices(
  cuts: Sequence[tuple[np.ndarray, np.ndarray]],
  sizes: Sequence[int],
  *,
  num_labels: int,
) -> np.ndarray:
  """`slices` of images [H, W, C] and labels [H, W] that were cut before."""
  columns = []
  for axis, size in enumerate(sizes):
    cut = [x.swapaxes(0, 1)[::-1] for x in cuts[axis]]
    row = {"image": cut[0], "label": cut[1], "prediction": cut[1]}
    cells = _cells({**row, "weight": np.ones(cut[1].shape)}, num_labels)[:2]
    column = _blank(_CELL + 2 * _GAP, _LINE + 2 * (_CELL + _GAP))
    title = f"axis {axis}, slice {size // 2} of 0..{size - 1}"
    _pen(column).text((_GAP, 3), title, _INK)
    for i, cell in enumerate(cells):
      place = (_GAP + (_CELL - cell.width) // 2, _LINE + i * (_CELL + _GAP))
      column.paste(cell, place)
    columns.append(np.asarray(column))
  return np.hstack(columns)


def error_map(
  label: np.ndarray, prediction: np.ndarray, weight: np.ndarray
) -> np.ndarray:
  """Where a prediction of [H, W] is right, and how it is wrong, as a picture.

  Light grey is correct foreground, near black correct background, sky blue
  missed (predicted background), vermillion invented (true background), yellow
  another class, hatched grey ignored (weight 0).
  """
  true, found, same = label > 0, prediction > 0, label == prediction
  kinds = [true & same, true & ~found, ~true & found, true & ~same]
  code = np.select(kinds, [1, 2, 3, 4], 0)
  rows, columns = np.indices(label.shape)
  hatch = np.array(_HATCH, np.uint8)[(rows + columns) // 3 % 2]
  colors = np.array(list(_ERRORS.values()), np.uint8)[code]
  return np.where((weight == 0)[..., None], hatch, colors)


def to_2d(row: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
  """The slice of a volume that has most foreground, across its shortest axis.

  Returns the row of `panel` and a note: "slice 12 of 0..34, axis 0". Rows of
  one or two spatial axes stay as they are.
  """
  label = np.where(row["weight"] > 0, row["label"], 0)
  if label.ndim != 3:
    return dict(row), ""
  axis = int(np.argmin(label.shape))
  last = label.shape[axis] - 1
  amount = np.sum(label > 0, axis=tuple({0, 1, 2} - {axis}))
  index = int(np.argmax(amount)) if amount.any() else (last + 1) // 2
  names = ("image", "label", "prediction", "weight")
  cut = {name: np.take(row[name], index, axis=axis) for name in names}
  return {**row, **cut}, f"slice {index} of 0..{last}, axis {axis}"


def panel(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
  """A sheet of examples: input, truth, prediction and error side by side.

  Signals (one spatial axis) are drawn as a curve above three coloured bars.

  Args:
    rows: one dict an example: image [*S, C], label, prediction and weight
      [*S], name (text) and, optionally, scores (name -> number or None), both
      shown above it. Sizes may differ, the number of axes may not.
  """
  num_labels = 2
  for row in rows:
    ids = np.maximum(row["label"], row["prediction"])[row["weight"] > 0]
    num_labels = max(num_labels, int(ids.max(initial=0)) + 1)
  parts = [_band(row, num_labels) for row in rows]
  if rows[0]["label"].ndim > 1:
    titles = _blank(_WIDTH, _LINE)
    for i, title in enumerate(("input", "truth", "prediction", "error")):
      x = _GAP + i * (_CELL + _GAP) + _CELL / 2
      _pen(titles).text((x, 4), title, _INK, anchor="ma")
    parts.insert(0, titles)
  _, *chips = _ERRORS.items()
  chips = chips if num_labels > 2 else chips[:-1]
  if any((row["weight"] == 0).any() for row in rows):
    chips.append(("ignored", _HATCH[1]))
  if num_labels > 2:
    colors = enumerate(map(tuple, class_colors(num_labels).tolist()))
    classes = [(f"class {i}", color) for i, color in colors]
    parts.append(_legend("class", classes[1:]))
  parts.append(_legend("error", chips))
  return Image.fromarray(np.vstack(parts))


def cells(
  row: Mapping[str, Any], num_labels: int
) -> tuple[list[Image.Image], str]:
  """The pictures of one row of `panel`, and the note of `to_2d`.

  Input, truth, prediction and error; of a signal one picture with all.
  """
  flat, note = to_2d(row)
  draw = _cells if flat["label"].ndim == 2 else _strips
  return draw(flat, num_labels), note


def _band(row: Mapping[str, Any], num_labels: int) -> Image.Image:
  """One example: a caption and, below it, its pictures."""
  pictures, note = cells(row, num_labels)
  name = str(row["name"])
  caption = [name if len(name) <= 60 else "..." + name[-57:]]
  for score, value in row.get("scores", {}).items():
    caption.append(f"{score} {'-' if value is None else f'{value:.3f}'}")
  band = _blank(_WIDTH, _LINE + pictures[0].height + _GAP)
  _pen(band).text((_GAP, 3), "   ".join([*caption, note]), _INK)
  for i, cell in enumerate(pictures):
    margin = max(_CELL - cell.width, 0) // 2
    band.paste(cell, (_GAP + i * (_CELL + _GAP) + margin, _LINE))
  return band


def _cells(row: Mapping[str, Any], num_labels: int) -> list[Image.Image]:
  """Input, truth, prediction and error of an image, in the size shown."""
  height, width = row["label"].shape
  factor = _CELL / max(height, width)
  # Enlarged by whole numbers: every pixel stays a square.
  factor = int(factor) if factor > 1 else factor
  size = max(round(width * factor), 1), max(round(height * factor), 1)
  smooth = _NEAREST if factor >= 1 else _BOX
  rgb = Image.fromarray(to_rgb(row["image"])).resize(size, smooth)
  cells = [rgb]
  for name in ("label", "prediction"):
    ids = np.where(row["weight"] > 0, row[name], 0).astype(np.int32)
    # Tinted after resizing: lines are one pixel of the sheet wide.
    ids = np.asarray(Image.fromarray(ids).resize(size, _NEAREST))
    tinted = overlay(np.asarray(rgb), ids, num_labels=num_labels)
    cells.append(Image.fromarray(tinted))
  errors = error_map(row["label"], row["prediction"], row["weight"])
  return [*cells, Image.fromarray(errors).resize(size, smooth)]


def _strips(row: Mapping[str, Any], num_labels: int) -> list[Image.Image]:
  """A signal as a curve, with truth, prediction and error as bars below it."""
  left, high, bar = 84, 96, 20
  width = _WIDTH - 2 * _GAP - left
  strip = _blank(left + width, high + 3 * bar)
  signal = np.where(np.isfinite(row["image"]), row["image"], 0.0)
  x = left + (np.arange(len(signal)) + 0.5) * width / len(signal)
  y = (signal.max() - signal) / (np.ptp(signal) or 1.0) * (high - 5) + 2
  for channel, ink in enumerate((_INK, *_PALETTE)[: signal.shape[-1]]):
    points = np.stack([x, y[:, channel]], axis=-1)
    _pen(strip).line(points.ravel().tolist(), ink)
  _pen(strip).text((0, high / 2), "input", _INK, anchor="lm")
  colors = class_colors(num_labels)
  colors[0] = _LIGHT
  truth, found = (row[n] * (row["weight"] > 0) for n in ("label", "prediction"))
  errors = error_map(truth[None], found[None], row["weight"][None])[0]
  bars = {"truth": colors[truth], "prediction": colors[found], "error": errors}
  for i, (name, pixels) in enumerate(bars.items()):
    image = Image.fromarray(pixels[None]).resize((width, bar - 4), _NEAREST)
    strip.paste(image, (left, high + i * bar + 4))
    _pen(strip).text((0, high + i * bar + 12), name, _INK, anchor="lm")
  return [strip]


def _legend(title: str, chips: Sequence[tuple[str, tuple]]) -> Image.Image:
  """A line of coloured squares and their names, as many as fit."""
  image = _blank(_WIDTH, _LINE)
  draw, x = _pen(image), 60
  draw.text((_GAP, 2), title, _INK)
  for name, color in chips:
    draw.rectangle((x, 4, x + 12, 16), color, _INK)
    draw.text((x + 18, 2), name, _INK)
    x += 34 + draw.textlength(name)
  return image


def _blank(width: int, height: int) -> Image.Image:
  return Image.new("RGB", (width, height), "white")


def _pen(image: Image.Image, size: int = _TEXT) -> ImageDraw.ImageDraw:
  draw = ImageDraw.Draw(image)
  draw.font = ImageFont.load_default(size=size)
  return draw


def curves(
  records: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> Image.Image:
  """Metrics over steps: one chart a metric, one line a split.

  The records are those of metrics.jsonl; the keys say what to draw of them,
  "SPLIT/METRIC": ("train/loss", "val/loss", "val/dice").
  """
  splits = dict.fromkeys(key.split("/")[0] for key in keys)
  inks = dict(zip(splits, (_BLUE, _VERMILLION, _GREEN, _PURPLE), strict=False))
  charts: dict[str, dict[str, np.ndarray]] = {}
  for split, metric in (key.split("/") for key in keys):
    own = [r for r in records if r["split"] == split and metric in r]
    points = [(r["step"], r[metric]) for r in own if r[metric] is not None]
    charts.setdefault(metric, {})[split] = np.reshape(points, (-1, 2))
  drawn = [_chart(metric, lines, inks) for metric, lines in charts.items()]
  return Image.fromarray(np.hstack(drawn))


def _chart(title: str, lines: Mapping, inks: Mapping) -> Image.Image:
  """480 x 300 pixels, drawn twice as large and shrunk: smooth lines."""
  left, top, right, bottom = 128, 68, 920, 516
  image = _blank(960, 600)
  draw = _pen(image, 2 * _TEXT)
  points = np.concatenate(list(lines.values()))
  x_ticks, y_ticks = ticks(points[:, 0]), ticks(points[:, 1])
  to_x = lambda step: np.interp(step, x_ticks[[0, -1]], (left, right))
  to_y = lambda value: np.interp(value, y_ticks[[0, -1]], (bottom, top))
  for tick, y in zip(y_ticks, to_y(y_ticks), strict=True):
    draw.line((left, y, right, y), _LIGHT, 2)
    draw.text((left - 12, y), f"{tick:.4g}", _INK, anchor="rm")
  for tick, x in zip(x_ticks, to_x(x_ticks), strict=True):
    draw.line((x, bottom, x, bottom + 8), _INK, 2)
    draw.text((x, bottom + 12), f"{tick:.6g}", _INK, anchor="ma")
  draw.line((left, bottom, right, bottom), _INK, 2)
  draw.text(((left + right) / 2, 592), "step", _INK, anchor="md")
  draw.text((left, 16), title, _INK)
  x = right
  for split in reversed(lines):
    points = np.stack([to_x(lines[split][:, 0]), to_y(lines[split][:, 1])], -1)
    draw.line(points.ravel().tolist(), inks[split], 4, joint="curve")
    draw.text((x, 16), split, inks[split], anchor="ra")
    x -= draw.textlength(split) + 32
  return image.resize((480, 300), _BOX)


def reliability(bins: np.ndarray) -> Image.Image:
  """How often a network is right, by how sure it is: a reliability diagram.

  A bar a bin, from 0 to its accuracy; a line ends where its mean confidence
  is, on the diagonal. Below, the share of the pixels that it holds.

  Args:
    bins: pixels, sum of confidences and right ones of each bin of confidence,
      float64 [M, 3].
  """
  left, right, top, bottom, base = 128, 928, 104, 904, 1144
  image = _blank(960, 1248)
  draw = _pen(image, 2 * _TEXT)
  total = max(bins[:, 0].sum(), 1.0)
  error = np.abs(bins[:, 2] - bins[:, 1]).sum() / total
  to_x = lambda share: left + share * (right - left)
  to_y = lambda share: bottom - share * (bottom - top)
  for tick in np.arange(6) / 5:
    draw.line((left, to_y(tick), right, to_y(tick)), _LIGHT, 2)
    draw.text((left - 12, to_y(tick)), f"{tick:.1f}", _INK, anchor="rm")
    draw.text((to_x(tick), base + 12), f"{tick:.1f}", _INK, anchor="ma")
  for m, (count, confidence, correct) in enumerate(bins):
    if count:
      x = to_x(m / len(bins)) + 2, to_x((m + 1) / len(bins)) - 2
      draw.rectangle((x[0], to_y(correct / count), x[1], bottom), _BLUE)
      y = to_y(confidence / count)
      draw.line((x[0], y, x[1], y), _VERMILLION, 6)
      high = (base - bottom - 96) * count / bins[:, 0].max()
      draw.rectangle((x[0], base - high, x[1], base), _SKY)
  draw.line((left, bottom, right, top), _INK, 2)
  draw.line((left, base, right, base), _INK, 2)
  draw.text((left, 16), f"accuracy     ECE {error:.4f}", _BLUE)
  draw.text((right, 16), "mean confidence", _VERMILLION, anchor="ra")
  share = bins[:, 0].max() / total
  label = f"pixels, the highest bar {100 * share:.1f} %"
  draw.text((left, bottom + 16), label, _INK)
  draw.text(((left + right) / 2, 1240), "confidence", _INK, anchor="md")
  return image.resize((480, 624), _BOX)


def ticks(values: np.ndarray) -> np.ndarray:
  """About four to ten round numbers that enclose all values."""
  low, high = values.min(initial=np.inf), values.max(initial=-np.inf)
  if not low < high:  # No value, or one.
    low, high = (low, low + 1) if low == high else (0, 1)
  unit = 10.0 ** np.floor(np.log10((high - low) / 4))
  step = unit * max(m for m in (1, 2, 5) if m * unit * 3.999 <= high - low)
  return np.arange(np.floor(low / step), np.ceil(high / step) + 0.5) * step


def save_png(path: str | os.PathLike, image: np.ndarray | Image.Image) -> None:
  """Writes a picture, or uint8 [H, W] or [H, W, 3]: `write_atomically`."""
  buffer = io.BytesIO()
  if not isinstance(image, Image.Image):
    image = Image.fromarray(np.asarray(image))
  image.save(buffer, "PNG")
  writers.write_atomically(path, buffer.getvalue())
