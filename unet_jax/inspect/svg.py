"""SVG, element by element; the picture becomes as large as what is in it."""

import math
from collections.abc import Sequence
from xml.sax import saxutils

import numpy as np

INK = "#222222"
TEXT_SIZE = 14

Point = tuple[float, float]


class Canvas:
  """SVG elements, and points that must be inside."""

  def __init__(self):
    self.items: list[str] = []
    self.points: list[Point] = []

  def add(self, tag: str, text: str = "", **attributes: object) -> None:
    """An element; numbers are written with one decimal."""
    words = [tag]
    for key, value in attributes.items():
      value = f"{value:.1f}" if isinstance(value, float) else str(value)
      words.append(f"{key.replace('_', '-')}={saxutils.quoteattr(value)}")
    body = f">{saxutils.escape(text)}</{tag}>" if text else "/>"
    self.items.append(f"<{' '.join(words)}{body}")

  def rect(
    self, at: Point, w: float, h: float, fill: str, **style: object
  ) -> None:
    """A rectangle with its corner at `at`."""
    (x, y) = at
    self.points += [at, (x + w, y + h)]
    self.add("rect", x=x, y=y, width=w, height=h, fill=fill, **style)

  def text(self, at: Point, text: str, anchor: str = "middle") -> None:
    """A line of text with its base line at `at`."""
    (x, y), width = at, text_width(text)
    left = x - width * {"start": 0, "middle": 0.5, "end": 1}[anchor]
    self.points += [(left, y - TEXT_SIZE), (left + width, y + 4)]
    self.add("text", text, x=x, y=y, text_anchor=anchor, fill=INK)

  def line(
    self, points: Sequence[Point], color: str, width: float, **style: object
  ) -> None:
    """A straight line of two points or a Bezier curve of four."""
    self.points += points
    path = [f"{x:.1f} {y:.1f}" for x, y in points]
    path = f"M {path[0]} {'C' if len(path) == 4 else 'L'} {', '.join(path[1:])}"
    style = {"stroke": color, "stroke_width": width, "fill": "none", **style}
    self.add("path", d=path, **style)

  def arrow(
    self, points: Sequence[Point], color: str, width: float, live: bool = True
  ) -> None:
    """A line with a head at its last point."""
    (x, y), (from_x, from_y) = points[-1], points[-2]
    size = (4 + 2 * width) / math.hypot(x - from_x, y - from_y)
    dx, dy = size * (x - from_x), size * (y - from_y)
    style = {} if live else {"stroke_dasharray": "5 4"}
    self.line([*points[:-1], (x - dx, y - dy)], color, width, **style)
    sides = [(x - dx - s * dy, y - dy + s * dx) for s in (0.42, -0.42)]
    self.polygon([(x, y), *sides], color)

  def polygon(self, points: Sequence[Point], fill: str) -> None:
    """A filled one."""
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    self.add("polygon", points=corners, fill=fill)

  def svg(self, title: str, description: str) -> str:
    """The whole document."""
    (x, y), (right, bottom) = np.min(self.points, 0), np.max(self.points, 0)
    x, y, w, h = x - 8, y - 8, right - x + 16, bottom - y + 16
    head = (
      f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{w:.0f}"'
      f' height="{h:.0f}" viewBox="{x:.1f} {y:.1f} {w:.1f} {h:.1f}"'
      f' font-family="Helvetica, Arial, sans-serif" font-size="{TEXT_SIZE}">'
    )
    title, description = saxutils.escape(title), saxutils.escape(description)
    head += f"<title>{title}</title><desc>{description}</desc>"
    size = f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}"'
    ground = f'<rect {size} fill="#ffffff"/>'
    return "\n".join([head, ground, *self.items, "</svg>\n"])


def text_width(text: str) -> float:
  """At least what a sans-serif font takes."""
  return TEXT_SIZE * sum(0.84 if letter == "×" else 0.62 for letter in text)


def tint(color: str) -> str:
  """Two thirds of the way to white."""
  channels = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
  return "#" + "".join(f"{255 - (255 - c) // 3:02x}" for c in channels)
