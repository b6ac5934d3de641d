"""`--mode describe`: a network in numbers and as a drawing, from its trace.

Nothing is trained or read; arrays exist in the measured receptive fields alone.
"""

import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.inspect import drawing, trace
from unet_jax.inspect.trace import Part, Wire
from unet_jax.models import skips
from unet_jax.runtime import writers

_NOTES = """\
MACs: multiply-accumulates of convolutions and matrix products, one example.
activations: outputs of convolutions, norms, upsampling and joins, one example.
sees: input pixels an axis that an output pixel depends on, measured; statistics
  of group and instance norm, which see the whole image, left out.
skips: "cut" where nothing of it reaches the decoder; parameters and MACs are
  what leaving the wire out would save, a carry of all levels not counted."""


def run(cfg: Config, workdir: pathlib.Path) -> None:
  """Writes network.txt and network.svg to `workdir`, and shows the first."""
  model = workdir_lib.make_model(cfg)
  shape = (1, *cfg.data.crop_size, cfg.data.channels)
  parts = trace.trace_parts(model, shape)
  wires = trace.find_wires(parts)
  kinds = skip_kinds(wires)
  head = next(part for part in parts if part.kind == "head")
  title = (
    f"{cfg.model.preset or 'U-Net'}: {_shape(shape)} -> {_shape(head.shape)}"
  )
  text = table(parts, wires, kinds, trace.receptive_fields(model))
  text = f"{title}\n\n{text}\n"
  svg = drawing.draw(parts, wires, kinds, title=title, description=text)
  writers.write_atomically(workdir / "network.txt", text.encode())
  writers.write_atomically(workdir / "network.svg", svg.encode())
  writers.log(f"{text}\nin {workdir}: network.txt network.svg")


def skip_kinds(wires: Sequence[Wire]) -> dict[str, str]:
  """What `model.skip` calls the skip in each part of kind "skip"."""
  names = {(skip.join, skip.carry): k for k, skip in skips.SKIPS.items()}
  carries = {
    wire.part.name: part.module
    for wire in wires
    for part in wire.via
    if part.kind == "carry" and wire.role == "sides"
  }
  joins = {w.part.name: w.part.module for w in wires if w.part.kind == "skip"}
  return {k: names[join, carries.get(k)] for k, join in joins.items()}


def skip_cost(wire: Wire, reader: Part) -> tuple[int, int]:
  """Parameters and MACs that leaving out a wire sideways would save.

  Its share of the skip's own and, where features are concatenated, of the
  convolutions in `reader`, the part that reads what the skip makes.
  """
  skip = wire.part
  if wire.port is None:
    return 0, 0
  sides = [port.shape[-1] for port in skip.ports if port.role == "sides"]
  up = sum(port.shape[-1] for port in skip.ports if port.role == "up")
  added = max(skip.shape[-1] - up, 0) / skip.shape[-1]
  share = added * wire.port.shape[-1] / sum(sides)
  (read,) = reader.ports
  own = [part for part in wire.via if part.kind == "side"]
  params = read.weights * share + skip.params / len(sides)
  macs = read.macs * share + skip.macs / len(sides)
  return (
    round(params) + sum(part.params for part in own),
    round(macs) + sum(part.macs for part in own),
  )


def table(
  parts: Sequence[Part],
  wires: Sequence[Wire],
  kinds: Mapping[str, str],
  fields: Mapping[str, float],
) -> str:
  """Parts, totals and skips as text; `fields` are the receptive fields."""
  macs = sum(part.macs for part in parts)
  unit, name = (10**9, "GMACs") if macs >= 10**9 else (10**6, "MMACs")
  head = ("level", "part", "module", "size", "channels")
  rows = [(*head, "parameters", name, "activations MiB", "sees")]
  for part in parts:
    head = (_level(part, wires), part.name, part.module.__name__)
    size = (drawing.size_text(part.shape), str(part.shape[-1]))
    sees = f"{fields[part.name]:.0f}" if part.name in fields else ""
    costs = _costs(part.params, part.macs / unit, part.activations)
    rows.append((*head, *size, *costs, sees.replace("inf", "all")))
  params = sum(part.params for part in parts)
  kept = sum(part.activations for part in parts)
  rows.append(("total", *[""] * 4, *_costs(params, macs / unit, kept), ""))
  head = ("from", "to", "kind", "shape", "crop", "parameters", name, "state")
  skip_rows = [head, *_skip_rows(parts, wires, kinds, unit)]
  return f"{_align(rows)}\n\n{_align(skip_rows)}\n\n{_NOTES}"


def _costs(params: int, macs: float, *activations: int) -> tuple[str, ...]:
  kept = [f"{size / 2**20:,.1f}" for size in activations]
  return (f"{params:,}", f"{macs:,.3f}", *kept)


def _skip_rows(
  parts: Sequence[Part],
  wires: Sequence[Wire],
  kinds: Mapping[str, str],
  unit: int,
) -> Iterator[tuple[str, ...]]:
  by_name = {part.name: part for part in parts}
  sides = [wire for wire in wires if wire.role == "sides"]
  # What a carry has mixed comes from several nodes through one port.
  for (skip, port), group in itertools.groupby(
    sides, lambda w: (w.part, w.port)
  ):
    wire, *others = group
    reader = by_name[skip.name.replace("skip", "decoder")]
    params, macs = skip_cost(wire, reader)
    yield (
      " ".join(w.source for w in (wire, *others)),
      reader.name,
      kinds[skip.name] if port else "none",
      _shape(port.shape) if port else "-",
      drawing.crop_text(by_name[wire.source].shape, wire) or "-",
      *_costs(params, macs / unit),
      "live" if wire.live else "cut",
    )


def _level(part: Part, wires: Sequence[Wire]) -> str:
  """Nodes are numbered; what leads to one, or reads one, is on its level."""
  if part.kind in ("encoder", "skip", "decoder", "pool"):
    return str(part.place[0])
  if part.kind in ("up", "side", "deep"):
    return next(str(w.part.place[0]) for w in wires if part in w.via)
  node, _ = part.ports[0].origins[0]
  return "" if part.kind == "carry" else node.split("_")[1]


def _align(rows: Sequence[Sequence[str]]) -> str:
  """Columns of one width; numbers are set to the right."""
  columns = []
  for head, *cells in zip(*rows, strict=True):
    width = max(map(len, (head, *cells)))
    numbers = "".join(cells).replace("all", "").strip("0123456789,.-") == ""
    place = str.rjust if numbers else str.ljust
    columns.append([place(cell, width) for cell in (head, *cells)])
  lines = zip(*columns, strict=True)
  return "\n".join("  ".join(line).rstrip() for line in lines)


def _shape(shape: Sequence[int]) -> str:
  """[B, *S, C] as 572²×64."""
  return f"{drawing.size_text(shape)}×{shape[-1]}"
