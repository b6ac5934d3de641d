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
sees: input pixels that an output pixel depends on, measured along the axis that
  is pooled most; statistics of group and instance norm, which see the whole
  image, left out.
skips: "cut" where nothing of it reaches the decoder; parameters and MACs are
  what leaving the wire out would save, a carry of all levels not counted."""


def run(cfg: Config, workdir: pathlib.Path) -> None:
  """Writes network.txt and network.svg to `workdir`, and shows the first."""
  model = workdir_lib.make_model(cfg)
  shape = (1, *cfg.input_size)
  parts = trace.trace_parts(model, shape)
  head = next(part for part in parts if part.kind == "head")
  name = cfg.model.preset or "U-Net"
  title = f"{name}: {_shape(shape)} -> {_shape(head.shape)}"
  text = f"{title}\n\n{table(parts, trace.receptive_fields(model))}\n"
  svg = drawing.draw(parts, skip_kinds(parts), title=title, description=text)
  writers.write_atomically(workdir / "network.txt", text.encode())
  writers.write_atomically(workdir / "network.svg", svg.encode())
  writers.log(f"{text}\nin {workdir}: network.txt network.svg")


def skip_kinds(parts: Sequence[Part]) -> dict[str, str]:
  """What `model.skip` calls the skip in each part of kind "skip"."""
  names = {(skip.join, skip.carry): k for k, skip in skips.SKIPS.items()}
  carry = next((part.module for part in parts if part.kind == "carry"), None)
  return {
    part.name: names[part.module, carry if _is_carried(part) else None]
    for part in parts
    if part.kind == "skip"
  }


def _is_carried(skip: Part) -> bool:
  return any("carry" in w.via for w in skip.wires if w.role == "sides")


def skip_cost(wire: Wire, by_name: Mapping[str, Part]) -> tuple[int, int]:
  """Parameters and MACs that leaving out a wire sideways would save.

  Its share of the skip's own and, where features are concatenated, of the
  convolutions that read what the skip makes.
  """
  skip = by_name[wire.part]
  if not wire.shape:
    return 0, 0
  reader = by_name[skip.name.replace("skip", "decoder")].wires[0]
  arrays = {w.array: w for w in skip.wires if w.shape}.values()
  sides = [w.shape[-1] for w in arrays if w.role == "sides"]
  up = sum(w.shape[-1] for w in arrays if w.role == "up")
  added = max(skip.shape[-1] - up, 0) / skip.shape[-1]
  share = added * wire.shape[-1] / sum(sides)
  own = [by_name[name] for name in wire.via if name.startswith("side")]
  params = reader.weights * share + skip.params / len(sides)
  macs = reader.macs * share + skip.macs / len(sides)
  params += sum(part.params for part in own)
  return round(params), round(macs + sum(part.macs for part in own))


def table(parts: Sequence[Part], fields: Mapping[str, float]) -> str:
  """Parts, totals and skips as text; `fields` are the receptive fields."""
  macs = sum(part.macs for part in parts)
  unit, name = (10**9, "GMACs") if macs >= 10**9 else (10**6, "MMACs")
  head = ("level", "part", "module", "size", "channels")
  rows = [(*head, "parameters", name, "activations MiB", "sees")]
  for part in parts:
    head = (_level(part, parts), part.name, part.module.__name__)
    size = (drawing.size_text(part.shape), str(part.shape[-1]))
    sees = f"{fields[part.name]:.0f}" if part.name in fields else ""
    costs = _costs(part.params, part.macs / unit, part.activations)
    rows.append((*head, *size, *costs, sees.replace("inf", "all")))
  params = sum(part.params for part in parts)
  kept = sum(part.activations for part in parts)
  rows.append(("total", *[""] * 4, *_costs(params, macs / unit, kept), ""))
  head = ("from", "to", "kind", "shape", "crop", "parameters", name, "state")
  skip_rows = [head, *_skip_rows(parts, unit)]
  return f"{_align(rows)}\n\n{_align(skip_rows)}\n\n{_NOTES}"


def _skip_rows(parts: Sequence[Part], unit: int) -> Iterator[tuple[str, ...]]:
  by_name, kinds = {part.name: part for part in parts}, skip_kinds(parts)
  sides = [w for part in parts for w in part.wires if w.role == "sides"]
  # What a carry has mixed comes from several nodes as one array.
  for (skip, _), group in itertools.groupby(sides, lambda w: (w.part, w.array)):
    wire, *others = group
    params, macs = skip_cost(wire, by_name)
    yield (
      " ".join(w.source for w in (wire, *others)),
      skip.replace("skip", "decoder"),
      kinds[skip] if wire.shape else "none",
      _shape(wire.shape) if wire.shape else "-",
      drawing.crop_text(by_name[wire.source].shape, wire) or "-",
      *_costs(params, macs / unit),
      "live" if wire.live else "cut",
    )


def _costs(params: int, macs: float, *activations: int) -> tuple[str, ...]:
  kept = [f"{size / 2**20:,.1f}" for size in activations]
  return (f"{params:,}", f"{macs:,.3f}", *kept)


def _level(part: Part, parts: Sequence[Part]) -> str:
  """Nodes are numbered; what leads to one, or reads one, is on its level."""
  if part.kind in ("up", "side", "deep"):
    skips = [p for p in parts if p.kind == "skip"]
    return next(
      str(p.place[0]) for p in skips for w in p.wires if part.name in w.via
    )
  if part.kind in ("encoder", "skip", "decoder", "pool"):
    return str(part.place[0])
  if part.kind in ("carry", "embed"):
    return ""
  return part.wires[0].source.split("_")[1]


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
