"""A network drawn as the U-Net paper draws it, as SVG.

Levels are rows. A box is a tensor, as high as the square root of its size and
as wide as the square root of its channels; a tensor that a skip made has the
colours of what it was joined from. Arrows are operations.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from xml.sax import saxutils

from unet_jax.inspect.trace import INPUT, Part, Wire

# Colours that colour-blind readers tell apart (Okabe and Ito 2008).
_ORANGE, _SKY, _GREEN = "#e69f00", "#56b4e9", "#009e73"
_BLUE, _VERMILLION, _PURPLE = "#0072b2", "#d55e00", "#cc79a7"
_INK, _GREY, _BOX = "#222222", "#8c8c8c", "#d5e3f0"
_BY_LEVEL = (_SKY, _ORANGE, _GREEN, _VERMILLION, _PURPLE)
# Units of the drawing: a letter, a line of text, the gaps between boxes and
# between nodes with many wires, the highest box, the width of one channel.
_TEXT, _LINE, _GAP, _SLACK, _HIGH, _CHANNEL = 14, 19, 30, 66, 130, 1.6
# Space between levels.
_ROW = 62

Point = tuple[float, float]


class _Canvas:
  """SVG elements and the rectangle that holds them all."""

  def __init__(self):
    self.items: list[str] = []
    self.left = self.top = math.inf
    self.right = self.bottom = -math.inf

  def _reach(self, *points: Point) -> None:
    for x, y in points:
      self.left, self.right = min(self.left, x), max(self.right, x)
      self.top, self.bottom = min(self.top, y), max(self.bottom, y)

  def add(self, tag: str, text: str = "", **attributes: object) -> None:
    """An element; numbers are written with one decimal."""
    words = [tag]
    for key, value in attributes.items():
      value = f"{value:.1f}" if isinstance(value, float) else str(value)
      words.append(f"{key.replace('_', '-')}={saxutils.quoteattr(value)}")
    body = f">{saxutils.escape(text)}</{tag}>" if text else "/>"
    self.items.append(f"<{' '.join(words)}{body}")

  def rect(
    self, x: float, y: float, w: float, h: float, fill: str, **style: object
  ) -> None:
    """A rectangle with its corner at (x, y)."""
    self._reach((x, y), (x + w, y + h))
    self.add("rect", x=x, y=y, width=w, height=h, fill=fill, **style)

  def text(self, x: float, y: float, text: str, anchor: str = "middle") -> None:
    """A line of text on the base line y."""
    width = _width(text)
    left = x - width * {"start": 0, "middle": 0.5, "end": 1}[anchor]
    self._reach((left, y - _TEXT), (left + width, y + 4))
    self.add("text", text, x=x, y=y, text_anchor=anchor, fill=_INK)

  def line(
    self, points: Sequence[Point], color: str, width: float, **style: object
  ) -> None:
    """A straight line of two points or a Bezier curve of four."""
    self._reach(*points)
    texts = [f"{x:.1f} {y:.1f}" for x, y in points]
    path = f"M {texts[0]} {'C' if len(points) == 4 else 'L'} "
    stroke = {"stroke": color, "stroke_width": width, "fill": "none"}
    self.add("path", d=path + ", ".join(texts[1:]), **stroke, **style)

  def arrow(
    self,
    points: Sequence[Point],
    color: str,
    width: float,
    dashed: bool = False,
  ) -> None:
    """A line with a head at its last point."""
    (x, y), (from_x, from_y) = points[-1], points[-2]
    length = math.hypot(x - from_x, y - from_y)
    size = 4 + 2 * width
    dx, dy = size * (x - from_x) / length, size * (y - from_y) / length
    style = {"stroke_dasharray": "5 4"} if dashed else {}
    self.line([*points[:-1], (x - dx, y - dy)], color, width, **style)
    corners = [(x, y)]
    for side in (0.42, -0.42):
      corners.append((x - dx - side * dy, y - dy + side * dx))
    head = " ".join(f"{u:.1f},{v:.1f}" for u, v in corners)
    self.add("polygon", points=head, fill=color)

  def svg(self, title: str, description: str) -> str:
    """The whole document."""
    x, y = self.left - 8, self.top - 8
    w, h = self.right + 8 - x, self.bottom + 8 - y
    head = (
      '<svg xmlns="http://www.w3.org/2000/svg" role="img"'
      f' width="{w:.0f}" height="{h:.0f}"'
      f' viewBox="{x:.1f} {y:.1f} {w:.1f} {h:.1f}"'
      f' font-family="Helvetica, Arial, sans-serif" font-size="{_TEXT}">'
    )
    ground = f'<rect x="{x:.1f}" y="{y:.1f}" width="100%" height="100%"'
    lines = [
      head,
      f"<title>{saxutils.escape(title)}</title>",
      f"<desc>{saxutils.escape(description)}</desc>",
      f'{ground} fill="#ffffff"/>',
      *self.items,
      "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _width(text: str) -> float:
  """At least what a sans-serif font takes."""
  return _TEXT * sum(0.84 if letter == "×" else 0.62 for letter in text)


def _tint(color: str) -> str:
  """Two thirds of the way to white."""
  channels = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
  return "#" + "".join(f"{255 - (255 - c) // 3:02x}" for c in channels)


def size_text(shape: Sequence[int]) -> str:
  """The spatial axes of [B, *S, C]: 572², 64³, 48×64×64."""
  sizes = shape[1:-1]
  if len(sizes) > 1 and len(set(sizes)) == 1:
    return f"{sizes[0]}{'²³'[len(sizes) - 2]}"
  return "×".join(map(str, sizes))


def shape_text(shape: Sequence[int]) -> str:
  """[B, *S, C] as 572²×64."""
  return f"{size_text(shape)}×{shape[-1]}"


def crop_text(shape: Sequence[int], wire: Wire) -> str:
  """Pixels that a wire loses at each border of `shape`; "" if none."""
  if not wire.port or "slice" not in wire.port.through:
    return ""
  sizes = zip(shape[1:-1], wire.port.shape[1:-1], strict=True)
  margins = dict.fromkeys((have - want) // 2 for have, want in sizes)
  return "/".join(map(str, margins)) if any(margins) else ""


# --- The figure ---------------------------------------------------------------


@dataclasses.dataclass
class _Box:
  """A tensor.

  Attributes:
    fills: colours from left to right, and their shares of the width.
    over: a colour that shares the whole box, where things are added.
    arrow: colour of the arrow from the box before.
    y: of the middle.
  """

  shape: Sequence[int]
  fills: Sequence[tuple[str, float]] = ((_BOX, 1.0),)
  over: str = ""
  arrow: str = _BLUE
  x: float = 0.0
  y: float = 0.0
  w: float = 0.0
  h: float = 0.0

  @property
  def middle(self) -> float:
    return self.x + self.w / 2

  @property
  def right(self) -> float:
    return self.x + self.w

  @property
  def top(self) -> float:
    return self.y - self.h / 2

  @property
  def bottom(self) -> float:
    return self.y + self.h / 2


@dataclasses.dataclass
class _Node:
  """The tensors of an encoder or decoder part, in a row.

  Attributes:
    slot: column in a V; each level further down is one step further right.
    entries: the wires that are joined, and where each enters the first box, as
      a share of its width; an encoder has none.
  """

  level: int
  slot: int
  boxes: list[_Box]
  entries: list[tuple[Wire, float]]

  @property
  def first(self) -> _Box:
    return self.boxes[0]

  @property
  def last(self) -> _Box:
    """What others get; the logits are for no one."""
    logits = self.boxes[-1].arrow == _INK
    return self.boxes[-2 if logits else -1]


@dataclasses.dataclass(frozen=True)
class _Figure:
  """What all that draws needs to know.

  Attributes:
    kinds: what the skip in each part of kind "skip" is called.
    depth: of the encoder.
    compact: nodes have many wires, so one box stands for a whole block.
    by_level: wires cross levels, so their colours tell where they come from.
  """

  canvas: _Canvas
  nodes: Mapping[str, _Node]
  kinds: Mapping[str, str]
  depth: int
  compact: bool
  by_level: bool
  gates: list[dict[str, object]] = dataclasses.field(default_factory=list)


def draw(
  parts: Sequence[Part],
  wires: Sequence[Wire],
  kinds: Mapping[str, str],
  *,
  title: str,
  description: str,
) -> str:
  """The network as an SVG document.

  Args:
    parts, wires: as found by `trace`, the cut ones included.
    kinds: what the skip in each part of kind "skip" is called.
    title, description: for readers that do not see it.
  """
  by_level = any(part.kind == "side" for part in parts)
  nested = any(len(p.place) > 1 for p in parts if p.kind == "skip")
  depth = max(p.place[0] for p in parts if p.kind == "encoder")
  figure = _Figure(_Canvas(), {}, kinds, depth, by_level or nested, by_level)
  figure.nodes.update(_make_nodes(figure, parts, wires))
  _place(figure)
  for node in figure.nodes.values():
    _draw_node(figure, node)
  for wire in wires:
    if wire.part.kind == "encoder" and wire.source != INPUT:
      _draw_pool(figure, wire)
    elif wire.role == "coarse" and wire.live:
      _draw_gate(figure, wire)
    elif wire.part.kind == "head" and wire.part.name != "head":
      _draw_head(figure, wire)
    elif wire.port is None:
      _draw_skip(figure, wire, 0.0)
  for node in figure.nodes.values():
    for wire, share in node.entries:
      (_draw_up if wire.role == "up" else _draw_skip)(figure, wire, share)
  if not figure.compact:
    _draw_carry(figure, wires)
  for gate in figure.gates:  # On top of their wires.
    figure.canvas.add("circle", **gate)
  _draw_legend(figure.canvas, _legend(figure, parts, wires))
  return figure.canvas.svg(title, description)


def _level(node: str) -> int:
  return int(node.split("_")[1])


def _target(figure: _Figure, wire: Wire) -> _Node:
  return figure.nodes[wire.part.name.replace("skip", "decoder")]


def _color(figure: _Figure, wire: Wire) -> str:
  if not wire.live:
    return _GREY
  if wire.role in ("sides", "up") and figure.by_level:
    return _BY_LEVEL[_level(wire.source) % len(_BY_LEVEL)]
  return _GREEN if wire.role == "up" else _ORANGE


# --- Nodes --------------------------------------------------------------------


def _make_nodes(
  figure: _Figure, parts: Sequence[Part], wires: Sequence[Wire]
) -> dict[str, _Node]:
  by_name, nodes = {part.name: part for part in parts}, {}
  for part in parts:
    if part.kind not in ("encoder", "decoder"):
      continue
    stages = [] if figure.compact else part.stages[:-1]
    boxes = [*(_Box(shape) for _, shape in stages), _Box(part.shape)]
    level, *column = part.place
    if part.kind == "encoder":
      if level == 0 or not figure.compact:
        boxes.insert(0, _Box(part.ports[0].shape))
      nodes[part.name] = _Node(level, level, boxes, [])
      continue
    column = column[0] if column else figure.depth - level
    skip = by_name[part.name.replace("decoder", "skip")]
    joined, entries = _join(figure, skip, wires)
    nodes[part.name] = _Node(
      level, level + 2 * column, [joined, *boxes], entries
    )
  for wire in wires:
    for part in wire.via:
      if part.kind == "transformer":
        boxes = nodes[wire.source].boxes
        if boxes[-1].arrow != _VERMILLION:
          boxes.append(_Box(part.shape, arrow=_VERMILLION))
    if wire.part.name == "head":
      logits = _Box(wire.part.shape, arrow=_INK)
      nodes[wire.source].boxes.append(logits)
  return nodes


def _join(
  figure: _Figure, skip: Part, wires: Sequence[Wire]
) -> tuple[_Box, list[tuple[Wire, float]]]:
  """The tensor that a skip makes, in the colours of what it is made of."""
  groups: dict[tuple, list[Wire]] = {}
  for wire in wires:
    joined = wire.part is skip and wire.role in ("sides", "up")
    if joined and wire.port:
      key = (skip.ports.index(wire.port), wire.via[:1])
      groups.setdefault(key, []).append(wire)
  channels = {}
  for (port, via), group in groups.items():
    alone = sum(other == port for other, _ in groups) == 1
    shape = skip.ports[port].shape if alone else via[0].shape
    # Where a carry has mixed the levels, the skip's own stands for all.
    wire = min(group, key=lambda w: _level(w.source) != skip.place[0])
    channels[wire] = shape[-1]
  up = sum(n for wire, n in channels.items() if wire.role == "up")
  sides = sum(channels.values()) - up
  rest = max(skip.shape[-1] - up, 0) / max(sides, 1)
  box, entries, x = _Box(skip.shape, []), [], 0.0
  for wire, n in channels.items():
    n = n if wire.role == "up" else n * rest
    share = min(n / skip.shape[-1], 1 - x)
    color = _tint(_color(figure, wire))
    box.fills.append((color, share))
    box.over = color if wire.live and not share else box.over
    entries.append((wire, x + share / 2))
    x += share
  return box, entries


def _place(figure: _Figure) -> None:
  """Sizes and places of all boxes."""
  nodes = figure.nodes.values()
  boxes = [box for node in nodes for box in node.boxes]
  axes = len(boxes[0].shape) - 2
  largest = max(math.prod(box.shape[1:-1]) for box in boxes)
  for box in boxes:
    pixels = math.prod(box.shape[1:-1]) / largest
    box.h = max(_HIGH * pixels ** (0.5 / axes), 8.0)
    box.w = max(_CHANNEL * math.sqrt(box.shape[-1]), 4.0)
  for node in nodes:
    for before, box in itertools.pairwise(node.boxes):
      labels = _label_width(before) + _label_width(box)
      room = labels / 2 + 8 - (before.w + box.w) / 2
      box.x = before.right + max(_GAP, room)
  x = 0.0
  for slot in range(max(node.slot for node in nodes) + 1):
    reach = 0.0
    for node in (n for n in nodes if n.slot == slot):
      # The arrow from the last box of the slot before points here.
      ups = [share for wire, share in node.entries if wire.role == "up"]
      entry = 0.5 if figure.by_level or not ups else ups[-1]
      shift = x - node.first.w * entry
      for box in node.boxes:
        box.x += shift
      reach = max(reach, node.last.middle - x)
    x += reach + (_SLACK if figure.compact else 0)
  y = 0.0
  for level in range(figure.depth + 1):
    row = [node for node in nodes if node.level == level]
    half = max(box.h for node in row for box in node.boxes) / 2
    arcs = 0 if figure.by_level else max(n.slot - level for n in row) // 2
    room = _arc(arcs) + 24 if figure.compact and arcs > 1 else _ROW
    y += half + max(room, _ROW)
    for box in (box for node in row for box in node.boxes):
      box.y = y
    y += half


def _arc(columns: int) -> float:
  """How high the arc of a wire rises that passes over nodes."""
  return 18.0 + 13 * columns


def _label_width(box: _Box) -> float:
  return max(_width(str(box.shape[-1])), _width(size_text(box.shape)))


def _draw_node(figure: _Figure, node: _Node) -> None:
  canvas = figure.canvas
  for box in node.boxes:
    x = box.x
    for color, share in box.fills:
      canvas.rect(x, box.top, box.w * share, box.h, color)
      x += box.w * share
    if box.over:
      corners = [(box.x, box.top), (box.right, box.top), (box.x, box.bottom)]
      triangle = " ".join(f"{u:.1f},{v:.1f}" for u, v in corners)
      canvas.add("polygon", points=triangle, fill=box.over)
    outline = {"stroke": _INK, "stroke_width": 0.8}
    canvas.rect(box.x, box.top, box.w, box.h, "none", **outline)
  for before, box in itertools.pairwise(node.boxes):
    ends = [(before.right + 3, box.y), (box.x - 3, box.y)]
    canvas.arrow(ends, box.arrow, 1.8)
  for i in range(len(node.boxes)):
    _draw_labels(figure, node, i)
  if node.boxes[-1].arrow == _INK:
    canvas.text(node.boxes[-1].right + 6, node.first.y + 5, "output", "start")
  if node.slot == 0:
    canvas.text(node.first.x - 6, node.first.y + 5, "input", "end")


def _draw_labels(figure: _Figure, node: _Node, i: int) -> None:
  """Channels above box i, its size below; beside it where an arrow passes."""
  box, text = node.boxes[i], figure.canvas.text
  encoder, lowest = not node.entries, node.level == figure.depth
  channels, size = str(box.shape[-1]), size_text(box.shape)
  rises = not figure.compact and box is node.last and node.level
  if rises and (lowest or not encoder):
    text(box.right + 4, box.top + 10, channels, "start")
  elif figure.by_level and not encoder and i == 0:
    text(box.x - 4, box.top + 10, channels, "end")
  elif figure.compact or not encoder or i or not node.level:
    text(box.middle, box.top - 5, channels)
  sizes = [b.shape[1:-1] for b in node.boxes]
  if i and sizes[i] == sizes[i - 1]:
    return
  if i == 0 and not encoder:
    if not figure.compact or sizes[0] != sizes[-1]:
      text(box.x + 2, box.bottom + _TEXT + 4, size, "end")
  elif i == 0 and figure.compact:
    text(box.x - 4, box.bottom, size, "end")
  elif encoder and box is node.last and not lowest:
    text(box.right + 4, box.bottom - 2, size, "start")
  else:
    text(box.middle, box.bottom + _TEXT + 1, size)


# --- Wires --------------------------------------------------------------------


def _stroke(figure: _Figure) -> float:
  return 1.3 if figure.compact else 1.8


def _draw_pool(figure: _Figure, wire: Wire) -> None:
  start, end = (
    figure.nodes[wire.source].last,
    figure.nodes[wire.part.name].first,
  )
  points = [(start.middle, start.bottom + 2), (end.middle, end.top - 2)]
  if figure.compact:
    corner = (start.middle, end.y)
    points = [points[0], corner, corner, (end.x - 2, end.y)]
  color = _GREY if figure.by_level else _PURPLE
  figure.canvas.arrow(points, color, _stroke(figure))


def _draw_up(figure: _Figure, wire: Wire, share: float) -> None:
  start, end = figure.nodes[wire.source].last, _target(figure, wire).first
  tip = (end.x + share * end.w, end.bottom + 2)
  points = [(start.middle, start.top - 2), tip]
  if figure.compact:
    y = start.y - 0.2 * start.h
    points = [(start.right + 2, y), (tip[0], y), (tip[0], y), tip]
  figure.canvas.arrow(points, _color(figure, wire), _stroke(figure))


def _draw_skip(figure: _Figure, wire: Wire, share: float) -> None:
  canvas, source, node = (
    figure.canvas,
    figure.nodes[wire.source],
    _target(figure, wire),
  )
  start, end, y = source.last, node.first, source.last.y
  color, live = _color(figure, wire), wire.live
  left, right = start.right + 2, end.x - 2
  columns = (node.slot - source.slot) // 2
  points = [(left, y), (right, y)]
  if source.level != node.level:
    x = end.x + share * end.w
    points = [(left, y), (x, y), (x, y), (x, end.top - 2)]
  elif figure.compact and not figure.by_level and columns > 1:
    most = (node.slot - node.level) // 2
    step = (end.h / 2 - 12) / max(most - 1, 1)
    tip = (right, end.top + 6 + step * (most - columns))
    peak = start.top - _arc(columns) / 0.75
    points = [(left, start.top + 5), (left + 40, peak), (right - 40, peak), tip]
  canvas.arrow(points, color, _stroke(figure), dashed=not live)
  if not live:
    x = (left + right) / 2
    for sign in (1, -1):
      ends = [(x - 5, y - 5 * sign), (x + 5, y + 5 * sign)]
      canvas.line(ends, _INK, 1.5)
  if not figure.compact:
    text = (
      [figure.kinds[wire.part.name]]
      if len(set(figure.kinds.values())) > 1
      else []
    )
    crop = crop_text(source.last.shape, wire)
    text += [f"crop {crop}"] if crop else []
    if text:
      canvas.text((left + right) / 2, y - 9, ", ".join(text))


def _draw_gate(figure: _Figure, wire: Wire) -> None:
  """The coarser feature opens and closes what comes sideways."""
  start, end = figure.nodes[wire.source].last, _target(figure, wire).first
  x, y, low = end.x - 10 - _label_width(end), end.y, end.bottom + _TEXT
  begin = (start.x + start.w / 4, start.top - 2)
  bend = [begin, (begin[0], low), (x, start.top), (x, low)]
  figure.canvas.line(bend, _VERMILLION, 1.2)
  figure.canvas.arrow([(x, low), (x, y + 8)], _VERMILLION, 1.2)
  circle = {"r": 6, "fill": "#ffffff", "stroke": _ORANGE, "stroke_width": 1.8}
  figure.gates.append({"cx": x, "cy": y, **circle})


def _draw_carry(figure: _Figure, wires: Sequence[Wire]) -> None:
  """What changes features on their way: a box a level, or one for them all."""
  carried = [
    wire
    for wire in wires
    if wire.role == "sides" and "carry" in {p.kind for p in wire.via}
  ]
  bottom = figure.nodes[f"encoder_{figure.depth}"]
  x = (bottom.first.middle + bottom.last.middle) / 2
  rows = {figure.nodes[w.source].last.y for w in carried}
  spans = [(y, y) for y in sorted(rows)]
  if any(_level(w.source) != w.part.place[0] for w in carried):
    spans = [(min(rows), max(rows))]
  style = {"rx": 5, "stroke": _ORANGE, "stroke_width": 1.8}
  for first, last in spans:
    size = (24.0, last - first + 24)
    figure.canvas.rect(x - 12, first - 12, *size, "#ffffff", **style)


def _draw_head(figure: _Figure, wire: Wire) -> None:
  """Logits for deep supervision."""
  start, canvas = figure.nodes[wire.source].last, figure.canvas
  y, high = start.y + 0.3 * start.h, 0.3 * start.h
  canvas.arrow([(start.right + 2, y), (start.right + 22, y)], _INK, 1.3)
  outline = {"stroke": _INK, "stroke_width": 0.8}
  canvas.rect(start.right + 24, y - high / 2, 4.0, high, _BOX, **outline)


# --- Legend -------------------------------------------------------------------

_UPS = {
  "TransposeUp": "transposed conv",
  "LinearUp": "linear upsampling",
  "AlignedUp": "linear upsampling, aligned corners",
}
# What is inside a block, as a reader calls it; the first of each row that fits.
_NAMES = (
  {"BatchNorm": "batch norm", "GroupNorm": "group norm"},
  {"InstanceNorm": "instance norm"},
  {"leaky_relu": "leaky ReLU", "erf": "GELU", "tanh": "GELU", "relu": "ReLU"},
)


def _legend(
  figure: _Figure, parts: Sequence[Part], wires: Sequence[Wire]
) -> list[tuple[str, str, bool]]:
  """Text, colour and whether dashed, of every kind of arrow in the drawing."""
  by_kind = {part.kind: part for part in reversed(parts)}
  block, up, head = by_kind["decoder"], by_kind["up"], by_kind["head"]
  names = [_window(block)]
  for table in _NAMES:
    names += [v for k, v in table.items() if k in block.inside][:1]
  times = f"{len(block.stages)} × " if len(block.stages) > 1 else ""
  conv = f"{times if figure.compact else ''}conv {', '.join(names)}"
  pool = by_kind.get("pool")
  down = f"conv {_window(pool)}, stride 2" if pool else "max pooling"
  entries = [
    (conv, _BLUE, False),
    (down, _GREY if figure.by_level else _PURPLE, False),
  ]
  if "transformer" in by_kind:
    entries.append(("self-attention layers", _VERMILLION, False))
  if not figure.by_level:
    entries.append(
      (_UPS.get(up.module.__name__, up.module.__name__), _GREEN, False)
    )
  for wire in wires:
    if wire.role not in ("sides", "up"):
      continue
    if wire.port is None:
      text = "no skip"
    elif figure.by_level:
      text = f"from level {_level(wire.source)}"
    elif wire.role == "sides":
      text = f"skip: {figure.kinds[wire.part.name]}"
    else:
      continue
    entries.append((text, _color(figure, wire), not wire.live))
  if any(w.role == "coarse" and w.live for w in wires):
    entries.append(("gating signal", _VERMILLION, False))
  entries.append((f"conv {_window(head)}", _INK, False))
  return list(dict.fromkeys(entries))


def _window(part: Part) -> str:
  axes = len(part.shape) - 2
  window = part.stages[0][0] if part.stages else (1,) * axes
  return "×".join(map(str, window))


def _draw_legend(
  canvas: _Canvas, entries: Sequence[tuple[str, str, bool]]
) -> None:
  """In rows below the drawing."""
  left, right, y = canvas.left, canvas.right, canvas.bottom + 30
  x = left
  for text, color, dashed in entries:
    width = 34 + _width(text)
    if x > left and x + width > right:
      x, y = left, y + _LINE + 4
    canvas.arrow([(x, y - 5), (x + 26, y - 5)], color, 1.8, dashed=dashed)
    canvas.text(x + 34, y, text, "start")
    x += width + 22
