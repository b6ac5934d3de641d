"""Compiles the train step for TPU chips that are not here: a JSON object a row.

  pip install libtpu
  python benchmarks/tpu_compile.py [NAME ...] [--topology v5e:2x2] [--table]

Nothing runs. XLA's compiler for TPU says what a step costs one chip: flops,
bytes, memory, and the collectives between chips. `bytes_accessed` is XLA's own
count, copies to and from memory on the chip included; `memory_traffic` is what
the instructions read and write off the chip. `--top N` also lists those that
move most, `--hlo DIR` keeps the whole program. `--table` prints the rows of
docs/tpu.md.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
import time

# name -> input of a chip [B, *S], model fields
CASES = {
  "seed": ((8, 256, 256), {"preset": "seed"}),
  "unet2015": ((1, 572, 572), {"preset": "unet2015"}),
  "volume": ((1, 64, 64, 64), {"dims": 3, "widths": (16, 32, 64, 128)}),
}
DTYPES = ("float32", "bfloat16")
# What only names, groups or reinterprets memory.
FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "after-all",
  "partition-id",
}
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
# f32[8,256,256,64]{3,0,2,1:T(8,128)S(1)}; S(1) is memory on the chip.
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")
# %name = TYPE opcode(operands), TYPE an array or a tuple of arrays
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z-]+)\((.*)$")


def compile_step(fields, shape, topology):
  """The train step as the program jits it, for every chip of a topology.

  Args:
    fields: of the model.
    shape: what each chip gets, [B, *S].
    topology: a name such as "v5e:2x2".
  """
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  from unet_jax import state as state_lib
  from unet_jax.models import build_model
  from unet_jax.objectives import losses
  from unet_jax.optimizer import make_optimizer, make_schedule
  from unet_jax.schema import OptimizerConfig
  from unet_jax.train_step import make_train_step

  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices
  mesh = Mesh(np.array(devices).reshape(-1, 1), ("data", "space"))
  whole = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec("data"))
  model = build_model(num_classes=1, **fields)
  cfg = OptimizerConfig(
    name="sgd", learning_rate=0.01, schedule="constant", weight_decay=0.0
  )
  tx = make_optimizer(cfg)
  terms = {"terms": ("binary_cross_entropy",), "weights": ()}
  step = make_train_step(
    model=model,
    loss_fn=losses.make_loss(**terms, class_weights=()),
    tx=tx,
    schedule=make_schedule(cfg, 1000),
  )
  step = jax.jit(
    step,
    in_shardings=(whole, split, whole),
    out_shardings=whole,
    donate_argnums=0,
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(
    lambda key: state_lib.init_state(model, tx, key, (1, *shape[1:], 1)), key
  )
  examples = shape[0] * len(devices)
  shapes = {
    "id": ((examples,), jnp.int32),
    "image": ((examples, *shape[1:], 1), jnp.float32),
    "label": ((examples, *shape[1:]), jnp.int32),
    "weight": ((examples, *shape[1:]), jnp.float32),
    "valid": ((examples,), jnp.float32),
  }
  batch = {k: jax.ShapeDtypeStruct(*v) for k, v in shapes.items()}
  return step.trace(state, batch, key).lower().compile()


def arrays(text):
  """(bytes, on the chip) of each array in a type, padded to its tiles."""
  found = []
  for kind, dims, layout in ARRAY.findall(text):
    bits = BITS.get(kind) or int(re.sub(r"\D", "", kind) or 0)
    dims = [int(d) for d in dims.split(",") if d]
    order, _, rest = layout.partition(":")
    if (tile := re.search(r"T\(([\d,]+)\)", rest)) and dims:
      # Minor axis first; the first tile covers the most minor axes.
      axes = [int(a) for a in order.split(",")]
      sides = [int(s) for s in tile[1].split(",")][::-1]
      for axis, side in zip(axes, sides, strict=False):
        dims[axis] = -(-dims[axis] // side) * side
    found.append((math.prod(dims) * bits // 8, "S(1)" in rest))
  return found


def instructions(text):
  """(bytes to and from the chip's memory, line) of what runs, most first.

  Those of the entry computation: loops and branches count as one pass.
  """
  entry = text[text.index("\nENTRY ") :]
  types, rows = {}, []
  for line in entry.splitlines():
    match = INSTRUCTION.match(line)
    if not match:
      continue
    name, type_, opcode, rest = match.groups()
    types[name] = type_
    if opcode in FREE or opcode.endswith("-done"):
      continue
    if opcode in ("copy-start", "slice-start"):  # From and to; one is a part.
      ends = arrays(type_)[:2]
      moved = min(ends)[0] * sum(not on_chip for _, on_chip in ends)
    else:
      operands = re.findall(r"%([\w.-]+)", rest.partition(")")[0])
      every = arrays(" ".join([type_, *(types.get(o, "") for o in operands)]))
      moved = sum(size for size, on_chip in every if not on_chip)
    rows.append((moved, line.strip()))
  return sorted(rows, reverse=True)


def measure(name, dtype, topology, hlo, top):
  """A row of the table."""
  shape, fields = CASES[name]
  start = time.perf_counter()
  compiled = compile_step({**fields, "dtype": dtype}, shape, topology)
  seconds = time.perf_counter() - start
  from unet_jax.inspect import hlo as hlo_lib

  text, cost = compiled.as_text(), compiled.cost_analysis()
  memory = compiled.memory_analysis()
  rows = instructions(text)
  if hlo:
    hlo.mkdir(parents=True, exist_ok=True)
    (hlo / f"{name}_{dtype}.txt").write_text(text)
  for moved, line in rows[:top]:
    print(f"{moved / 1e6:8.1f} MB  {line[:300]}", file=sys.stderr)
  return {
    "name": name,
    "dtype": dtype,
    "topology": topology,
    "chip_batch": shape[0],
    "chip_image": list(shape[1:]),
    "flops": cost["flops"],
    "bytes_accessed": cost["bytes accessed"],
    "memory_traffic": sum(row[0] for row in rows),
    "temporary_bytes": memory.temp_size_in_bytes,
    "argument_bytes": memory.argument_size_in_bytes,
    "output_bytes": memory.output_size_in_bytes,
    "donated_bytes": memory.alias_size_in_bytes,
    "collectives": hlo_lib.count_collectives(text),
    "compile_seconds": round(seconds, 1),
  }


def table_row(row):
  """A row of docs/tpu.md."""
  megabytes = ("temporary_bytes", "argument_bytes", "output_bytes")
  size = "x".join(map(str, row["chip_image"]))
  collectives = row["collectives"].items()
  cells = [
    f"`{row['name']}`, {row['chip_batch']} of {size}",
    row["dtype"],
    f"{row['flops'] / 1e12:.3f}",
    f"{row['bytes_accessed'] / 1e9:.2f}",
    f"{row['memory_traffic'] / 1e9:.2f}",
    *(f"{row[key] / 1e6:.0f}" for key in megabytes),
    ", ".join(f"{sums['count']} {kind}" for kind, sums in collectives),
    f"{row['compile_seconds']:.0f}",
  ]
  return f"| {' | '.join(cells)} |"


def main():
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", default=list(CASES), metavar="NAME")
  parser.add_argument("--dtype", nargs="*", default=DTYPES, choices=DTYPES)
  parser.add_argument("--topology", default="v5e:2x2")
  parser.add_argument("--table", action="store_true", help="Markdown")
  parser.add_argument("--hlo", type=pathlib.Path, metavar="DIR")
  parser.add_argument("--top", type=int, default=0, metavar="N")
  flags = parser.parse_args()
  if importlib.util.find_spec("libtpu") is None:
    print("error: no libtpu here: pip install libtpu", file=sys.stderr)
    return 2
  # No TPU is looked for: not on this machine, not at a cloud's metadata server.
  os.environ.update(TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu")
  for name in flags.names:
    for dtype in flags.dtype:
      row = measure(name, dtype, flags.topology, flags.hlo, flags.top)
      print(table_row(row) if flags.table else json.dumps(row), flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
