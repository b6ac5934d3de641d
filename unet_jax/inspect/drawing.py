"""A network drawn as the U-Net paper draws it, as SVG.

Levels are rows. A box is a tensor, as high as the square root of its size and
as wide as the square root of its channels; a tensor that a skip made has the
colours of what it was joined from. Arrows are operations.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from unet_jax.inspect import svg
from unet_jax.inspect.svg import Point
from unet_jax.inspect.trace import INPUT, Part, Wire

# Colours that colour-blind readers tell apart (Okabe and Ito 2008).
_ORANGE, _SKY, _GREEN = "#e69f00", "#56b4e9", "#009e73"
_BLUE, _VERMILLION, _PURPLE = "#0072b2", "#d55e00", "#cc79a7"
_GREY, _BOX = "#8c8c8c", "#d5e3f0"
_BY_LEVEL = (_SKY, _ORANGE, _GREEN, _VERMILLION, _PURPLE)
_OUTLINE = {"stroke": svg.INK, "stroke_width": 0.8}
# Gaps between boxes, levels, and nodes with many wires, the highest box, the
# width of one channel.
_GAP, _ROW, _SLACK, _HIGH, _CHANNEL = 30, 62, 66, 130, 1.6
_UPS = {
  "TransposeUp": "transposed conv",
  "LinearUp": "linear upsampling",
  "AlignedUp": "linear upsampling, aligned corners",
}
# What may be inside a block, as readers call it: norms, then activations.
_NAMES = {
  **{"BatchNorm": "batch norm", "GroupNorm": "group norm"},
  **{"InstanceNorm": "instance norm", "leaky_relu": "leaky ReLU"},
  **{"erf": "GELU", "tanh": "GELU", "relu": "ReLU"},
}


def size_text(shape: Sequence[int]) -> str:
  """The spatial axes of [B, *S, C]: 572², 64³, 48×64×64."""
  sizes = shape[1:-1]
  if len(sizes) > 1 and len(set(sizes)) == 1:
    return f"{sizes[0]}{'²³'[len(sizes) - 2]}"
  return "×".join(map(str, sizes))


def crop_text(shape: Sequence[int], wire: Wire) -> str:
  """Pixels that a wire loses at each border of `shape`; "" if none."""
  sizes = zip(shape[1:-1], wire.shape[1:-1], strict=False)
  margins = dict.fromkeys((have - want) // 2 for have, want in sizes)
  return "/".join(map(str, margins)) if wire.cropped and any(margins) else ""


# --- Boxes and nodes ----------------------------------------------------------


@dataclasses.dataclass
class _Box:
  """A tensor; (x, y) is its middle."""

  shape: Sequence[int]
  # Colours from left to right, and their shares of the width.
  fills: Sequence[tuple[str, float]] = ((_BOX, 1.0),)
  over: str = ""  # The colour of what was added to all of it.
  arrow: str = _BLUE  # Colour of the arrow from the box before.
  x: float = 0.0
  y: float = 0.0
  w: float = 0.0
  h: float = 0.0

  def at(self, dx: float, dy: float, gap: float = 2) -> Point:
    """A place: (0, 0) is the middle, (1, -1) the upper right corner."""
    x, y = (math.copysign(gap, d) if abs(d) == 1 else 0 for d in (dx, dy))
    return self.x + dx * self.w / 2 + x, self.y + dy * self.h / 2 + y

  @property
  def label_width(self) -> float:
    return max(
      svg.text_width(str(self.shape[-1])), svg.text_width(size_text(self.shape))
    )


class _Node(NamedTuple):
  """The tensors of an encoder or a decoder, in a row."""

  level: int
  slot: int  # Column of a V: each level down is one step to the right.
  boxes: list[_Box]
  # Wires that are joined, and where in the first box, -1 (left) to 1.
  entries: list[tuple[Wire, float]]

  @property
  def out(self) -> _Box:
    """What others get; the logits are for no one."""
    return self.boxes[-2 if self.boxes[-1].arrow == svg.INK else -1]


class _Figure(NamedTuple):
  """What all that draws needs to know."""

  canvas: svg.Canvas
  parts: Mapping[str, Part]
  kinds: Mapping[str, str]  # What the skip in each part is called.
  nodes: dict[str, _Node]
  depth: int
  compact: bool  # Many wires: one box stands for a whole block.
  by_level: bool  # Wires cross levels: colours tell where they come from.

  def ends(self, wire: Wire) -> tuple[_Box, _Box]:
    """The boxes that a wire leaves and enters."""
    target = self.nodes[wire.part.replace("skip", "decoder")]
    return self.nodes[wire.source].out, target.boxes[0]

  def color(self, wire: Wire) -> str:
    if not wire.live or (wire.role == "x" and self.by_level):
      return _GREY
    if wire.role == "x":  # Down to the next encoder.
      return _PURPLE
    if self.by_level:
      return _BY_LEVEL[_level(wire.source) % len(_BY_LEVEL)]
    return _GREEN if wire.role == "up" else _ORANGE


def draw(
  parts: Sequence[Part],
  kinds: Mapping[str, str],
  *,
  title: str,
  description: str,
) -> str:
  """The network as an SVG document.

  `kinds` is what the skip in each part is called; title and description are for
  readers that do not see the drawing.
  """
  by_name = {part.name: part for part in parts}
  by_level = any(part.kind == "deep" for part in parts)
  nested = any(p.kind == "skip" and len(p.place) > 1 for p in parts)
  depth = max(p.place[0] for p in parts if p.kind == "encoder")
  figure = _Figure(
    svg.Canvas(), by_name, kinds, {}, depth, by_level or nested, by_level
  )
  head = next(part for part in parts if part.kind == "head")
  _make_nodes(figure, head)
  _place_columns(figure)
  _place_rows(figure)
  for node in figure.nodes.values():
    _draw_node(figure, node)
  wires = [wire for part in parts for wire in part.wires]
  for wire in wires:
    kind = by_name[wire.part].kind
    if (kind == "encoder" and wire.source != INPUT) or not wire.shape:
      _draw_wire(figure, wire)
    elif kind == "head" and wire.part != head.name:
      _draw_head(figure, wire)
  for node in figure.nodes.values():
    for wire, place in node.entries:
      _draw_wire(figure, wire, place)
  if not figure.compact:
    _draw_carry(figure, [wire for wire in wires if "carry" in wire.via])
    for wire in wires:
      if wire.role == "coarse" and wire.live:
        _draw_gate(figure, wire)
  _draw_legend(figure.canvas, _legend(figure, head))
  return figure.canvas.svg(title, description)


def _level(node: str) -> int:
  return int(node.split("_")[1])


def _make_nodes(figure: _Figure, head: Part) -> None:
  nodes = figure.nodes
  for part in figure.parts.values():
    if part.kind not in ("encoder", "decoder"):
      continue
    stages = [] if figure.compact else part.stages[:-1]
    boxes = [*(_Box(shape) for _, shape in stages), _Box(part.shape)]
    level, *column = part.place
    slot, entries = level, []
    if part.kind == "decoder":
      slot += 2 * (column[0] if column else figure.depth - level)
      skip = figure.parts[part.name.replace("decoder", "skip")]
      joined, entries = _join(figure, skip)
      boxes.insert(0, joined)
    elif level == 0 or not figure.compact:
      boxes.insert(0, _Box(part.wires[0].shape))
    nodes[part.name] = _Node(level, slot, boxes, entries)
  if bottom := figure.parts.get("transformer"):
    box = _Box(bottom.shape, arrow=_VERMILLION)
    nodes[f"encoder_{figure.depth}"].boxes.append(box)
  nodes[head.wires[0].source].boxes.append(_Box(head.shape, arrow=svg.INK))


def _join(figure: _Figure, skip: Part) -> tuple[_Box, list[tuple[Wire, float]]]:
  """The tensor that a skip makes, in the colours of what it is made of."""
  groups: dict[tuple, list[Wire]] = {}
  for wire in skip.wires:
    if wire.shape and wire.role in ("sides", "up"):
      groups.setdefault((wire.array, wire.via[:1]), []).append(wire)
  channels = {}
  for (array, via), group in groups.items():
    alone = sum(other == array for other, _ in groups) == 1
    # Where a carry has mixed the levels, the skip's own stands for all.
    wire = min(group, key=lambda w: _level(w.source) != skip.place[0])
    channels[wire] = (wire if alone else figure.parts[via[0]]).shape[-1]
  up = sum(n for wire, n in channels.items() if wire.role == "up")
  sides = sum(channels.values()) - up
  added = max(skip.shape[-1] - up, 0) / max(sides, 1)
  box, entries, x = _Box(skip.shape, []), [], 0.0
  for wire, n in channels.items():
    share = n * (1 if wire.role == "up" else added) / skip.shape[-1]
    share, color = min(share, 1 - x), svg.tint(figure.color(wire))
    box.fills.append((color, share))
    box.over = color if wire.live and not share else box.over
    entries.append((wire, 2 * x + share - 1))
    x += share
  return box, entries


def _place_columns(figure: _Figure) -> None:
  """Widths of all boxes, and where they are from left to right."""
  nodes, start = figure.nodes.values(), 0.0
  for box in (box for node in nodes for box in node.boxes):
    box.w = max(_CHANNEL * math.sqrt(box.shape[-1]), 4.0)
  for before, box in (p for n in nodes for p in itertools.pairwise(n.boxes)):
    labels = (before.label_width + box.label_width) / 2 + 8
    box.x = before.x + max((before.w + box.w) / 2 + _GAP, labels)
  for slot in range(max(node.slot for node in nodes) + 1):
    reach = start
    for node in (node for node in nodes if node.slot == slot):
      # The arrow from the last box of the slot before points here.
      ups = [place for wire, place in node.entries if wire.role == "up"]
      entry = 0.0 if figure.by_level or not ups else ups[-1]
      shift = start - node.boxes[0].at(entry, 0, 0)[0]
      for box in node.boxes:
        box.x += shift
      reach = max(reach, node.out.x)
    start = reach + (_SLACK if figure.compact else 0)


def _place_rows(figure: _Figure) -> None:
  """Heights of all boxes, and where they are from above."""
  nodes, y = figure.nodes.values(), 0.0
  boxes = [box for node in nodes for box in node.boxes]
  largest = max(math.prod(box.shape[1:-1]) for box in boxes)
  for box in boxes:
    pixels = math.prod(box.shape[1:-1]) / largest
    box.h = max(_HIGH * pixels ** (0.5 / (len(box.shape) - 2)), 14.0)
  for level in range(figure.depth + 1):
    row = [node for node in nodes if node.level == level]
    half = max(box.h for node in row for box in node.boxes) / 2
    columns = max(node.slot - level for node in row) // 2
    arcs = figure.compact and not figure.by_level and columns > 1
    y += half + (max(_arc(columns) + 24, _ROW) if arcs else _ROW)
    for box in (box for node in row for box in node.boxes):
      box.y = y
    y += half


def _arc(columns: int) -> float:
  """How high the arc of a wire rises that passes over nodes."""
  return 18.0 + 13 * columns


def _draw_node(figure: _Figure, node: _Node) -> None:
  canvas = figure.canvas
  for i, box in enumerate(node.boxes):
    x, y = box.at(-1, -1, 0)
    left = x
    for color, share in box.fills:
      canvas.rect((left, y), box.w * share, box.h, color)
      left += box.w * share
    if box.over:
      canvas.polygon([(x, y), (x + box.w, y), (x, y + box.h)], box.over)
    canvas.rect((x, y), box.w, box.h, "none", **_OUTLINE)
    _draw_labels(figure, node, i)
  for before, box in itertools.pairwise(node.boxes):
    canvas.arrow([before.at(1, 0, 3), box.at(-1, 0, 3)], box.arrow, 1.8)
  if node.boxes[-1] is not node.out:
    x, y = node.boxes[-1].at(1, 0, 6)
    canvas.text((x, y + 5), "output", "start")
  if node.slot == 0:
    x, y = node.boxes[0].at(-1, 0, 6)
    canvas.text((x, y + 5), "input", "end")


def _draw_labels(figure: _Figure, node: _Node, i: int) -> None:
  """Channels above box i, its size below; beside it where an arrow passes."""
  box, text = node.boxes[i], figure.canvas.text
  encoder, lowest = not node.entries, node.level == figure.depth
  channels, size = str(box.shape[-1]), size_text(box.shape)
  (left, top), (right, bottom) = box.at(-1, -1, 4), box.at(1, 1, 4)
  rises = not figure.compact and box is node.out and node.level
  if rises and (lowest or not encoder):
    text((right, top + 14), channels, "start")
  elif figure.by_level and not encoder and i == 0:
    text((left, top + 14), channels, "end")
  elif figure.compact or not encoder or i or not node.level:
    text((box.x, top - 1), channels)
  sizes = [b.shape[1:-1] for b in node.boxes]
  if i and sizes[i] == sizes[i - 1]:
    return
  if i == 0 and not encoder:
    if not figure.compact or sizes[0] != sizes[-1]:
      text((left + 2, bottom + svg.TEXT_SIZE), size, "end")
  elif i == 0 and figure.compact and not lowest:
    text((left, bottom - 4), size, "end")
  elif encoder and box is node.out and not lowest:
    text((right, bottom - 6), size, "start")
  else:
    text((box.x, bottom + svg.TEXT_SIZE - 3), size)


# --- Wires --------------------------------------------------------------------


def _bend(begin: Point, corner: Point, tip: Point) -> list[Point]:
  return [begin, corner, corner, tip]


def _route(figure: _Figure, wire: Wire, place: float) -> list[Point]:
  """A straight line, or a curve where many wires would meet or cross boxes."""
  start, end = figure.ends(wire)
  if wire.role == "x":
    points = _bend(start.at(0, 1), (start.x, end.y), end.at(-1, 0))
    return points if figure.compact else [start.at(0, 1), end.at(0, -1)]
  if wire.role == "up":
    (x, y), tip = start.at(1, -0.4), end.at(place, 1)
    points = _bend((x, y), (tip[0], y), tip)
    return points if figure.compact else [start.at(0, -1), tip]
  (left, y), (right, _) = start.at(1, 0), end.at(-1, 0)
  node = figure.nodes[wire.part.replace("skip", "decoder")]
  columns = (node.slot - figure.nodes[wire.source].slot) // 2
  if _level(wire.source) != node.level:
    tip = end.at(place, -1)
    return _bend((left, y), (tip[0], y), tip)
  if columns == 1 or figure.by_level or not figure.compact:
    return [(left, y), (right, y)]
  (_, top), (_, tip) = start.at(0, -1, 0), end.at(0, -1, 0)
  peak, most = top - _arc(columns) / 0.75, (node.slot - node.level) // 2
  tip += 6 + (end.h / 2 - 12) / (most - 1) * (most - columns)
  return [(left, top + 5), (left + 40, peak), (right - 40, peak), (right, tip)]


def _draw_wire(figure: _Figure, wire: Wire, place: float = 0.0) -> None:
  canvas, points = figure.canvas, _route(figure, wire, place)
  stroke = 1.3 if figure.compact else 1.8
  canvas.arrow(points, figure.color(wire), stroke, wire.live)
  weights = (1, 1) if len(points) == 2 else (1, 3, 3, 1)
  x, y = np.average(points, axis=0, weights=weights)
  if not wire.live:
    canvas.line([(x - 5, y - 5), (x + 5, y + 5)], svg.INK, 1.5)
    canvas.line([(x - 5, y + 5), (x + 5, y - 5)], svg.INK, 1.5)
  if wire.role == "sides" and not figure.compact:
    crop = crop_text(figure.ends(wire)[0].shape, wire)
    mixed = len({*figure.kinds.values()}) > 1
    words = [figure.kinds[wire.part]] * mixed + [f"crop {crop}"] * bool(crop)
    if words:
      canvas.text((x, y - (9 if wire.live else 12)), ", ".join(words))


def _draw_gate(figure: _Figure, wire: Wire) -> None:
  """The coarser feature opens and closes what comes sideways."""
  (start, end), canvas = figure.ends(wire), figure.canvas
  (x, y), (_, low) = start.at(-0.5, -1), end.at(0, 1, svg.TEXT_SIZE)
  gate = end.at(-1, 0, 10)[0] - end.label_width
  points = [(x, y), (x, low), (gate, y), (gate, low)]
  canvas.line(points, _VERMILLION, 1.2)
  canvas.arrow([(gate, low), (gate, end.y + 8)], _VERMILLION, 1.2)
  style = {"stroke": _ORANGE, "stroke_width": 1.8, "fill": "#ffffff"}
  canvas.add("circle", cx=gate, cy=end.y, r=6, **style)


def _draw_carry(figure: _Figure, wires: Sequence[Wire]) -> None:
  """What changes features on their way: a box a level, or one for them all."""
  boxes = figure.nodes[f"encoder_{figure.depth}"].boxes
  x = (boxes[0].x + boxes[-1].x) / 2 - 12
  spans = [(y, y) for y in sorted({figure.ends(w)[0].y for w in wires})]
  if any(_level(w.source) != _level(w.part) for w in wires):
    spans = [(spans[0][0], spans[-1][0])]
  style = {"rx": 5, "stroke": _ORANGE, "stroke_width": 1.8}
  for top, bottom in spans:
    size = (24.0, bottom - top + 24)
    figure.canvas.rect((x, top - 12), *size, "#ffffff", **style)


def _draw_head(figure: _Figure, wire: Wire) -> None:
  """Logits for deep supervision."""
  box = figure.nodes[wire.source].out
  x, y = box.at(1, 0.6)
  figure.canvas.arrow([(x, y), (x + 20, y)], svg.INK, 1.3)
  corner, high = (x + 22, y - 0.15 * box.h), 0.3 * box.h
  figure.canvas.rect(corner, 4.0, high, _BOX, **_OUTLINE)


# --- Legend -------------------------------------------------------------------


def _legend(figure: _Figure, head: Part) -> list[tuple[str, str, bool]]:
  """Text, colour and whether live, of every kind of arrow in the drawing."""
  by_kind = {part.kind: part for part in reversed(figure.parts.values())}
  block, up, pool = by_kind["decoder"], by_kind["up"], by_kind.get("pool")
  counts = [len(by_kind[kind].stages) for kind in ("decoder", "encoder")]
  conv = f"{counts[0]} × " if figure.compact and counts[0] > 1 else ""
  conv += f"conv {_window(block)}"
  names = [name for key, name in _NAMES.items() if key in block.inside]
  down = f"conv {_window(pool)}, stride 2" if pool else "max pooling"
  conv = ", ".join([conv, *names[:2]])
  if figure.compact and counts[0] != counts[1]:
    conv += f" (encoder: {counts[1]} ×)"
  entries = [
    (conv, _BLUE, True),
    (down, _GREY if figure.by_level else _PURPLE, True),
  ]
  if "transformer" in by_kind:
    entries.append(("self-attention layers", _VERMILLION, True))
  if not figure.by_level:
    name = up.module.__name__
    entries.append((_UPS.get(name, name), _GREEN, True))
  joins = set()
  for wire in (w for part in figure.parts.values() for w in part.wires):
    style = (figure.color(wire), wire.live)
    if wire.role == "sides" and not wire.shape:
      joins.add(("no skip", *style))
    elif figure.by_level and wire.role in ("sides", "up"):
      joins.add((f"from level {_level(wire.source)}", *style))
    elif wire.role == "sides":
      joins.add((f"skip: {figure.kinds[wire.part]}", *style))
    elif wire.role == "coarse" and wire.live and not figure.compact:
      joins.add(("gating signal", _VERMILLION, True))
  return [
    *entries,
    *sorted(joins),
    (f"output conv {_window(head)}", svg.INK, True),
  ]


def _window(part: Part) -> str:
  window = part.stages[0][0] if part.stages else (1,) * (len(part.shape) - 2)
  return "×".join(map(str, window))


def _draw_legend(
  canvas: svg.Canvas, entries: Sequence[tuple[str, str, bool]]
) -> None:
  """In rows below the drawing."""
  (left, _), (right, y) = np.min(canvas.points, 0), np.max(canvas.points, 0)
  x, y = left, y + 30
  for text, color, live in entries:
    width = 34 + svg.text_width(text)
    if x > left and x + width > right:
      x, y = left, y + svg.TEXT_SIZE + 9
    canvas.arrow([(x, y - 5), (x + 26, y - 5)], color, 1.8, live)
    canvas.text((x + 34, y), text, "start")
    x += width + 22
