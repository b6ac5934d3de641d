"""Charts of a study as SVG for a page; its style sheet has the colours.

Drawn about as wide as a phone's screen, so that text stays readable there.
"""

import html
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from unet_jax.inspect import pictures

WIDTH = 440
_LETTER = 7.4  # Width of a letter, about, in units of the drawing.

_AROUND = (-5, 5, 15, -15, 25, -25)
# (mean, low, high); the ends are NaN where there is no interval.
Interval = tuple[float, float, float]


def forest(
  rows: Sequence[tuple[str, Interval, str]], margin: float, title: str
) -> str:
  """Differences to the baseline with their intervals, one below the other.

  Args:
    rows: name, difference and verdict of each arm.
    margin: differences within +- this do not matter; a band shows it.
    title: of the chart.
  """
  ends = [x for _, interval, _ in rows for x in interval]
  plot = _Plot(16, WIDTH - 16, 26 + 50 * len(rows), 26)
  plot.x_axis(pictures.ticks(_finite([*ends, -margin, margin])))
  left, right = plot.x(-margin), plot.x(margin)
  plot.add(
    "rect",
    class_="margin",
    x=left,
    y=plot.top,
    width=right - left,
    height=plot.bottom - plot.top,
  )
  zero = plot.x(0)
  plot.line((zero, plot.top), (zero, plot.bottom), "zero")
  middle = min(max(zero, 110), WIDTH - 110)
  plot.text(middle, 16, f"no difference; band: ±{margin:g}", "middle", "note")
  for i, (name, interval, verdict) in enumerate(rows):
    y = 64 + 50 * i
    kind = verdict.split()[0]
    room = int((WIDTH - 32) / _LETTER) - len(verdict) - 2
    plot.text(16, y - 14, _cut(name, room), "start")
    plot.text(WIDTH - 16, y - 14, verdict, "end", f"note {kind}")
    plot.interval(interval, y, kind, f"{name}: {verdict}")
  words = [
    f"{name}: {interval_text(interval, signed=True)}, {verdict}."
    for name, interval, verdict in rows
  ]
  return plot.svg(title, " ".join(words))


def cost(
  points: Sequence[tuple[str, float, Interval]],
  baselines: Collection[str],
  what: str,
) -> str:
  """Dice against a cost on a logarithmic axis; arms are numbered from 1.

  Args:
    points: name, cost > 0 and Dice of each arm.
    baselines: names among them.
    what: the cost.
  """
  plot = _Plot(56, WIDTH - 20, 250, 44)
  y_ticks = pictures.ticks(_finite([x for *_, dice in points for x in dice]))
  plot.y_axis(y_ticks, f"Dice ({y_ticks[0]:g} to {y_ticks[-1]:g})")
  logs = np.log10([max(amount, 1) for _, amount, _ in points])
  low, high = logs.min() - 0.1, logs.max() + 0.1
  marks = [
    math.log10(factor) + power
    for power in range(math.floor(low), math.ceil(high))
    for factor in ((1,) if high - low > 3 else (1, 2, 5))
  ]
  marks = [x for x in marks if low <= x <= high]
  if len(marks) < 2:
    marks = sorted({logs.min(), logs.max()})
  plot.x_axis(np.array(marks), (low, high), [amount(10**x) for x in marks])
  plot.text(WIDTH - 20, 20, f"{what}, logarithmic", "end", "note")
  columns: list[float] = []
  for x in map(plot.x, logs):
    # Lines that would hide one another stand side by side.
    while any(abs(x - other) < 6 for other in columns):
      x += 6
    columns.append(x)
  taken = [
    (x, plot.y(dice[0])) for x, (*_, dice) in zip(columns, points, strict=True)
  ]
  for i, ((name, _, dice), x) in enumerate(zip(points, columns, strict=True)):
    mean, low, high = dice
    if not math.isfinite(mean):
      continue
    kind = "baseline" if name in baselines else "arm"
    if math.isfinite(low):
      plot.line((x, plot.y(low)), (x, plot.y(high)), "whisker")
    text = f"{name}: {interval_text(dice)}"
    plot.mark(x, plot.y(mean), kind, text)
    # The first place whose neighbourhood has no number yet.
    places = [(x + dx, plot.y(mean) + dy) for dy in _AROUND for dx in (11, -11)]
    free = (p for p in places if all(math.dist(p, q) > 11 for q in taken))
    taken.append(next(free, places[0]))
    plot.text(*taken[-1], str(i + 1), "middle", "note")
  words = [f"{name}: {amount(a)}, {interval_text(d)}." for name, a, d in points]
  return plot.svg(f"Dice against {what}", " ".join(words))


def curve(
  name: str,
  steps: Mapping[int, Sequence[float]],
  baseline: Mapping[int, Sequence[float]],
  ticks: tuple[np.ndarray, np.ndarray],
) -> str:
  """Mean over seeds by step, and a band from the lowest to the highest seed.

  The last step has a mark, so that a curve of one step is seen.

  Args:
    name: of the arm.
    steps: the scores of all seeds by step.
    baseline: the same of the baseline, drawn as a dashed mean.
    ticks: of both axes, the same for all arms.
  """
  plot = _Plot(56, WIDTH - 20, 176, 30)
  plot.y_axis(ticks[1], f"{ticks[1][0]:g} to {ticks[1][-1]:g}")
  plot.x_axis(ticks[0])
  plot.text(WIDTH - 20, 20, _cut(name, 40), "end")
  path = lambda values: " ".join(
    f"{plot.x(s):.1f},{plot.y(v):.1f}" for s, v in values
  )
  upper = [(s, max(v)) for s, v in steps.items()]
  lower = [(s, min(v)) for s, v in reversed(steps.items())]
  plot.add("polygon", class_="band", points=path([*upper, *lower]))
  for kind, values in (("baseline", baseline), ("arm", steps)):
    means = [(s, float(np.mean(v))) for s, v in values.items()]
    plot.add("polyline", class_=f"curve {kind}", points=path(means))
  last, values = next(reversed(steps.items()))
  x, mean = plot.x(last), plot.y(float(np.mean(values)))
  plot.line((x, plot.y(min(values))), (x, plot.y(max(values))), "whisker")
  plot.mark(x, mean, "arm", f"{name}: step {last}")
  return plot.svg(
    f"Learning curve of {name}",
    f"Dice {np.mean(values):.4f} at step {last},"
    f" seeds {min(values):.4f} to {max(values):.4f}.",
  )


def interval_text(interval: Interval, signed: bool = False) -> str:
  """`0.912 (0.905 to 0.919)`, or without the ends where there are none."""
  form = "{:+.4f}" if signed else "{:.4f}"
  mean, low, high = (
    form.format(x).replace("-", "\N{MINUS SIGN}") for x in interval
  )
  return f"{mean} ({low} to {high})" if math.isfinite(interval[1]) else mean


def amount(value: float) -> str:
  """`1.23 M`."""
  units = ("", " k", " M", " G", " T")
  power = min(int(math.log10(max(value, 1)) / 3 + 1e-9), len(units) - 1)
  return f"{value / 1000**power:.3g}{units[power]}"


class _Plot:
  """SVG elements within axes."""

  def __init__(self, left: float, right: float, bottom: float, top: float):
    self.left, self.right = left, right
    self.bottom, self.top = bottom, top
    self._x = self._y = (0.0, 1.0)
    self._items: list[str] = []

  def x(self, value: float) -> float:
    return float(np.interp(value, self._x, (self.left, self.right)))

  def y(self, value: float) -> float:
    return float(np.interp(value, self._y, (self.bottom, self.top)))

  def x_axis(
    self,
    ticks: np.ndarray,
    ends: tuple[float, float] | None = None,
    texts: Sequence[str] | None = None,
  ) -> None:
    """Ticks below; the axis goes from the first to the last, or over `ends`."""
    self._x = ends or (ticks[0], ticks[-1])
    texts = texts or [f"{tick:.6g}" for tick in ticks]
    room = max(len(text) for text in texts) * _LETTER + 8
    every = math.ceil(room * len(ticks) / (self.right - self.left + room))
    for i, (tick, text) in enumerate(zip(ticks, texts, strict=True)):
      x = self.x(tick)
      self.line((x, self.bottom), (x, self.bottom + 4), "axis")
      if i % every == 0:
        self.text(x, self.bottom + 18, text, "middle", "note")
    self.line((self.left, self.bottom), (self.right, self.bottom), "axis")

  def y_axis(self, ticks: np.ndarray, title: str) -> None:
    self._y = ticks[0], ticks[-1]
    for tick in ticks:
      y = self.y(tick)
      self.line((self.left, y), (self.right, y), "grid")
      self.text(self.left - 6, y + 4, f"{tick:.4g}", "end", "note")
    self.text(4, 20, title, "start", "note")

  def interval(
    self, interval: Interval, y: float, kind: str, text: str
  ) -> None:
    """A horizontal one with its mark."""
    mean, low, high = interval
    if math.isfinite(low):
      self.line((self.x(low), y), (self.x(high), y), f"whisker {kind}")
    self.mark(self.x(mean), y, kind, text)

  def mark(self, x: float, y: float, kind: str, text: str) -> None:
    """Its shape says what its colour says."""
    corners = {
      "better": ((-7, 5), (7, 5), (0, -8)),
      "worse": ((-7, -5), (7, -5), (0, 8)),
      "baseline": ((-5, -5), (5, -5), (5, 5), (-5, 5)),
    }.get(
      kind, [(5 * math.cos(a), 5 * math.sin(a)) for a in np.arange(0, 6.3, 0.4)]
    )
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    self.add("polygon", text, class_=f"mark {kind}", points=points)

  def line(
    self, start: tuple[float, float], end: tuple[float, float], kind: str
  ) -> None:
    (x1, y1), (x2, y2) = start, end
    self.add("line", class_=kind, x1=x1, y1=y1, x2=x2, y2=y2)

  def text(
    self, x: float, y: float, text: str, anchor: str, kind: str = ""
  ) -> None:
    place = f'class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    self._items.append(f"<text {place}>{html.escape(text)}</text>")

  def add(self, tag: str, title: str = "", **attributes: object) -> None:
    """An element, with what a pointer that rests on it is told."""
    words = [tag]
    for key, value in attributes.items():
      value = f"{value:.1f}" if isinstance(value, float) else str(value)
      words.append(f'{key.rstrip("_")}="{html.escape(value)}"')
    inside = f"<title>{html.escape(title)}</title>" if title else ""
    self._items.append(f"<{' '.join(words)}>{inside}</{tag}>")

  def svg(self, title: str, description: str) -> str:
    words = html.escape(title), html.escape(description)
    return "\n".join(
      [
        f'<svg role="img" viewBox="0 0 {WIDTH} {self.bottom + 26:.0f}"'
        f' width="{WIDTH}">',
        f"<title>{words[0]}</title><desc>{words[1]}</desc>",
        *self._items,
        "</svg>",
      ]
    )


def _cut(text: str, room: int) -> str:
  return text if len(text) <= room else text[: max(room - 1, 1)] + "…"


def _finite(values: Sequence[float]) -> np.ndarray:
  values = np.array(values, float)
  return values[np.isfinite(values)]
