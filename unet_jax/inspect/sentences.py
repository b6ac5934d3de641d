"""Pictures of tagged sentences: words in lines, tags below them."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_INK, _GREY, _WRONG = (40, 40, 40), (120, 120, 120), (213, 94, 0)
_WIDTH, _GAP, _ROW, _BLOCK = 1064, 10, 17, 60


def panel(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
  """A sheet of sentences; below each word its tag, and a wrong prediction.

  Args:
    rows: one dict a sentence: name (text), forms, tags and prediction (as many
      texts each), and scores (name -> number) shown beside the name. What the
      font cannot draw is a box.
  """
  pen = _pen(Image.new("RGB", (1, 1)))
  lines: list[tuple[str, Any]] = []
  for row in rows:
    scores = [f"{name} {x:.3f}" for name, x in row["scores"].items()]
    lines.append(("head", "   ".join([row["name"][-80:], *scores])))
    lines += [("words", line) for line in _break(pen, row)]
  legend = "below each word: its tag; in vermillion: another that was predicted"
  lines.append(("head", legend))
  heights = {"head": _ROW + _GAP, "words": _BLOCK}
  height = _GAP + sum(heights[kind] for kind, _ in lines)
  sheet = Image.new("RGB", (_WIDTH, height), "white")
  pen, y = _pen(sheet), _GAP
  for kind, content in lines:
    if kind == "head":
      pen.text((_GAP, y), content, _GREY)
    else:
      for x, form, tag, found in content:
        pen.text((x, y), form, _INK)
        pen.text((x, y + _ROW), tag, _GREY)
        if found != tag:
          pen.text((x, y + 2 * _ROW), found, _WRONG)
    y += heights[kind]
  return sheet


def _break(pen: ImageDraw.ImageDraw, row: Mapping[str, Any]) -> list[list]:
  """Lines of (x, form, tag, predicted tag) that fit."""
  lines, x = [[]], 2 * _GAP
  for token in zip(row["forms"], row["tags"], row["prediction"], strict=True):
    token = (token[0][:60], *token[1:])
    wide = max(map(pen.textlength, token))
    if x + wide > _WIDTH - _GAP and lines[-1]:
      lines.append([])
      x = 2 * _GAP
    lines[-1].append((x, *token))
    x += wide + _GAP
  return lines


def _pen(image: Image.Image) -> ImageDraw.ImageDraw:
  draw = ImageDraw.Draw(image)
  draw.font = ImageFont.load_default(size=14)
  return draw
