import itertools
import math
import pathlib
import xml.etree.ElementTree as ET

import flax.linen as nn
import jax
import numpy as np
import pytest
from clu import parameter_overview

from tests import runs
from tests.models import variants
from unet_jax.inspect import cost, describe, drawing, trace
from unet_jax.main import main
from unet_jax.models import build_model
from unet_jax.models.skips import Context

SVG = "{http://www.w3.org/2000/svg}"
WIDTHS = (4, 8, 16)


def _model(**fields):
  fields = {"dims": 1, "widths": WIDTHS, "norm": "none", **fields}
  return build_model(num_classes=2, **fields)


def _by_name(parts):
  return {part.name: part for part in parts}


def _sides(parts):
  return [w for part in parts for w in part.wires if w.role == "sides"]


def _sizes(part):
  return [shape[1] for _, shape in part.stages]


# --- Parts --------------------------------------------------------------------


def test_the_trace_of_the_paper():
  model = build_model(num_classes=2, preset="unet2015")
  parts = _by_name(trace.trace_parts(model, (1, 572, 572, 1)))
  encoder = [parts[f"encoder_{level}"] for level in range(5)]
  decoder = [parts[f"decoder_{level}"] for level in range(4)]
  assert [_sizes(p) for p in encoder] == [
    *([570, 568], [282, 280], [138, 136], [66, 64], [30, 28])
  ]
  assert [_sizes(p) for p in decoder] == [
    *([390, 388], [198, 196], [102, 100], [54, 52])
  ]
  assert [parts[f"up_{level}"].shape[1] for level in range(4)] == [
    *(392, 200, 104, 56)
  ]
  assert parts["head"].shape == (1, 388, 388, 2)
  crops = {
    wire.part: drawing.crop_text(parts[wire.source].shape, wire)
    for wire in _sides(parts.values())
  }
  assert crops == {
    "skip_0": "88",
    "skip_1": "40",
    "skip_2": "16",
    "skip_3": "4",
  }
  assert parts["skip_0"].activations == 4 * 392 * 392 * 128


@pytest.mark.parametrize(
  "fields",
  [
    {"preset": "unet2015"},
    {"preset": "unetpp", "deep_supervision": True},
    {"preset": "unet3p", "classification_guided": True},
    {"preset": "attention"},
    {"preset": "seed"},
    {"dims": 3, "norm": "instance", "pool": "stride", "residual": True},
    {"bottleneck": "transformer", "skip": "uctrans"},
    {"skip": "respath", "squeeze_excite": True},
    {"skip": "udtrans", "skip_levels": (True, False, True)},
    {"dtype": "bfloat16", "skip": "uctrans", "bottleneck": "transformer"},
  ],
  ids=str,
)
def test_rows_sum_to_the_totals(fields):
  model = build_model(num_classes=3, **fields)
  size = 188 if model.padding == "valid" else 32
  shape = (1, *(size,) * model.dims, 3)
  variables, logits = variants.abstract(model, shape)
  parts = trace.trace_parts(model, shape)
  params = parameter_overview.count_parameters(variables["params"])
  assert sum(part.params for part in parts) == params
  image = jax.ShapeDtypeStruct(shape, np.float32)
  macs = cost.count_macs(model.apply, variables, image)
  assert sum(part.macs for part in parts) == macs
  assert _by_name(parts)["head"].shape == logits.shape


def test_bfloat16_keeps_half_the_bytes_and_changes_nothing_else():
  parts, fields = [], []
  for dtype in ("float32", "bfloat16"):
    model = _model(dtype=dtype, skip="attn_same", norm="batch", pool="stride")
    parts.append(trace.trace_parts(model, (1, 32, 1)))
    fields.append(trace.receptive_fields(model))
  single, half = parts
  assert [2 * part.activations for part in half] == [
    part.activations for part in single
  ]
  assert [part._replace(activations=0, inside=None) for part in half] == [
    part._replace(activations=0, inside=None) for part in single
  ]
  assert fields[0] == fields[1]


# --- Receptive fields ---------------------------------------------------------


def _sees(steps):
  """Pixels that the output pixels of a node see: intervals, traced back."""
  widest = 0
  for phase in range(32):
    first = last = 1000 + phase
    for step in steps:
      if step == "conv":
        first, last = first - 1, last + 1
      elif step == "pool":
        first, last = 2 * first, 2 * last + 1
      else:
        first, last = first // 2, last // 2
    widest = max(widest, last - first + 1)
  return widest


def test_receptive_fields_of_the_paper():
  fields = trace.receptive_fields(build_model(num_classes=2, preset="unet2015"))
  block, expected = ["conv", "conv"], {}
  down = [[*block, *["pool", *block] * level] for level in range(5)]
  for level, steps in enumerate(down):
    expected[f"encoder_{level}"] = _sees(steps)
  assert list(expected.values()) == [5, 14, 32, 68, 140]
  steps = down[4]
  for level in (3, 2, 1, 0):
    steps = [*block, "up", *steps]
    expected[f"decoder_{level}"] = _sees(steps)
  expected["head"] = expected["decoder_0"]
  assert fields == expected


@pytest.mark.parametrize("skip", ["se", "attn_same", "uctrans", "shuffle"])
def test_who_sees_the_whole_image(skip):
  fields = trace.receptive_fields(_model(skip=skip))
  plain = trace.receptive_fields(_model())
  assert fields["encoder_2"] == plain["encoder_2"] == 32
  if skip in ("se", "uctrans"):
    assert math.isinf(fields["head"])
  elif skip == "shuffle":  # Another image's features are nothing seen here.
    assert fields == trace.receptive_fields(_model(skip="none"))
  else:
    assert fields == plain


def test_self_attention_sees_the_whole_image():
  fields = trace.receptive_fields(_model(bottleneck="transformer"))
  assert fields["encoder_1"] == 14
  assert math.isinf(fields["decoder_1"]) and math.isinf(fields["head"])


# --- Wires --------------------------------------------------------------------


def _has_gradient(model, shape):
  """{skip: whether the output changes with each thing that comes sideways}."""
  image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  variables = variants.fill(model, image)
  context, arrived = Context(partner=np.zeros(1, np.int32)), {}

  def apply(changes):
    def intercept(call, args, kwargs, info):
      name = info.module.path[-1] if info.module.path else ""
      if info.method_name != "__call__" or not name.startswith("skip"):
        return call(*args, **kwargs)
      (wires,) = args
      arrived[name] = [x.shape for x in wires.sides]
      if name in changes:
        pairs = zip(wires.sides, changes[name], strict=True)
        wires = wires._replace(sides=[x + change for x, change in pairs])
      return call(wires, **kwargs)

    with nn.intercept_methods(intercept):
      return (model.apply(variables, image, context=context) ** 2).sum()

  jax.eval_shape(apply, {})
  zeros = {k: [np.zeros(s, np.float32) for s in v] for k, v in arrived.items()}
  grads = jax.jit(jax.grad(apply))(zeros)
  return {k: [bool(np.any(g != 0)) for g in v] for k, v in grads.items()}


LEVELS = [(), (False, True), (True, False), (False, False)]


@pytest.mark.parametrize(
  "decoder, skip, levels",
  [
    *(("plain", "concat", levels) for levels in LEVELS),
    *(("nested", "concat", levels) for levels in LEVELS[1:3]),
    *(("full_scale", "concat", levels) for levels in LEVELS[1:3]),
    *(("plain", skip, ()) for skip in variants.SILENT),
    *(("plain", skip, ()) for skip in ("mul", "uctrans", "attn_oktay")),
    ("plain", "respath", (False, True)),
    ("nested", "zeros", ()),
  ],
)
def test_wires_are_drawn_live_where_there_is_a_gradient(decoder, skip, levels):
  model = _model(decoder=decoder, skip=skip, skip_levels=levels)
  shape = (1, 16, 1)
  parts = trace.trace_parts(model, shape)
  wires = _sides(parts)
  found = {part.name: [] for part in parts if part.kind == "skip"}
  arrays = {(w.part, w.array): w for w in wires}.values()
  for wire in arrays:
    found[wire.part] += [wire.live] if wire.shape else []
  assert found == _has_gradient(model, shape)
  kinds = describe.skip_kinds(parts)
  svg = drawing.draw(parts, kinds, title="a<b", description="&")
  lines = [e.attrib for e in ET.fromstring(svg).iter(f"{SVG}path")]
  dashed = sum("stroke-dasharray" in line for line in lines)
  cut = sum(not wire.live for wire in arrays)
  assert dashed == cut + (cut > 0)  # And once in the legend.


def test_wires_come_from_where_the_paper_says():
  parts = trace.trace_parts(_model(decoder="nested"), (1, 16, 1))
  assert {(w.source, w.part) for w in _sides(parts)} == {
    ("encoder_0", "skip_0_1"),
    ("encoder_1", "skip_1_1"),
    ("encoder_0", "skip_0_2"),
    ("decoder_0_1", "skip_0_2"),
  }
  parts = trace.trace_parts(_model(decoder="full_scale"), (1, 16, 1))
  wires = {(w.source, w.part) for part in parts for w in part.wires}
  for source, target in itertools.product(range(3), range(2)):
    kind = "decoder" if target < source < 2 else "encoder"
    assert (f"{kind}_{source}", f"skip_{target}") in wires


@pytest.mark.parametrize("skip", ["concat", "zeros", "proj", "attn_oktay"])
def test_a_skip_costs_what_is_saved_without_it(skip):
  shape = (1, 16, 16, 1)
  fields = {"dims": 2, "skip": skip, "norm": "batch"}
  whole = trace.trace_parts(_model(**fields), shape)
  sides = {wire.part: wire for wire in _sides(whole)}
  for level in range(2):
    on = tuple(k != level for k in range(2))
    rest = trace.trace_parts(_model(**fields, skip_levels=on), shape)
    costs = describe.skip_cost(sides[f"skip_{level}"], _by_name(whole))
    for cost_of_skip, name in zip(costs, ("params", "macs"), strict=True):
      saved = sum(getattr(p, name) for p in whole)
      saved -= sum(getattr(p, name) for p in rest)
      assert cost_of_skip == saved, (level, name)


# --- The mode -----------------------------------------------------------------


def _describe(workdir, *flags):
  assert main(runs.arguments(workdir, *flags, mode="describe")) == 0
  return [(workdir / f"network.{end}").read_text() for end in ("txt", "svg")]


def test_describe_writes_a_table_and_a_drawing(tmp_path, capsys):
  flags = ["--config.model.preset=unet2015", "--config.data.num_classes=2"]
  text, svg = _describe(tmp_path, *flags)
  assert {p.name for p in tmp_path.iterdir()} == {"network.txt", "network.svg"}
  assert text in capsys.readouterr().err
  rows = [line.split() for line in text.splitlines()]
  assert ["total", "31,030,658", "150.428", "660.0"] in rows
  assert [row[-1] for row in rows if row[1:2] == ["encoder_4"]] == ["140"]
  assert "encoder_0 decoder_0 concat 392²×64 88 36,864".split() in [
    row[:6] for row in rows
  ]
  root = ET.fromstring(svg)
  texts = {element.text for element in root.iter(f"{SVG}text")}
  sizes = (572, 570, 568, 284, 282, 280, 140, 28, 56, 392, 390, 388)
  assert {f"{size}²" for size in sizes} <= texts
  assert {"crop 88", "crop 40", "crop 16", "crop 4"} <= texts
  assert root.find(f"{SVG}title").text == "unet2015: 572²×1 -> 388²×2"
  assert _describe(tmp_path, *flags) == [text, svg]


def test_describe_needs_a_config(tmp_path, capsys):
  assert main(["--mode", "describe", "--workdir", str(tmp_path)]) == 2
  assert "--config is missing" in capsys.readouterr().err


def test_the_picture_in_the_readme_is_what_the_program_draws(tmp_path):
  flags = ["--config.model.preset=unet2015", "--config.data.num_classes=2"]
  argv = ["--config", "configs/synthetic.py", "--workdir", str(tmp_path)]
  assert main(["--mode", "describe", *argv, *flags]) == 0
  drawn = (tmp_path / "network.svg").read_text()
  assert drawn == pathlib.Path("docs/network.svg").read_text()
