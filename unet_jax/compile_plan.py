"""`--mode compile`: what a train step costs on devices that are not here.

XLA compiles the step for a topology and says what it holds, computes and moves.
Nothing runs. What it would take in time is a prediction, from published peaks:

  t = max(flops / peak, bytes / memory bandwidth) + collectives,

without overlap of the two, an all-reduce of S bytes over n chips taking
2 (n - 1) / n S over what a chip sends (a ring, each way at once), all others S,
and each of them a microsecond a chip of the longest side of the slice.
"""

import dataclasses
import math
import pathlib
import time
from typing import Any

import jax

from unet_jax import program
from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.inspect import hlo
from unet_jax.runtime import parallel, writers

# Seconds that a message takes to the next chip.
_HOP_SECONDS = 1e-6
_MOST_CHIPS = 256


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of a chip.

  Attributes:
    flops: peak in bfloat16, a second. On TPU float32 products also run in
      bfloat16 unless a higher precision is asked for.
    memory_bytes, memory_bandwidth: of its HBM; bytes, bytes a second.
    link_bandwidth: bytes a second that it sends to its neighbours.
    source: where the figures are.
  """

  flops: float
  memory_bytes: float
  memory_bandwidth: float
  link_bandwidth: float
  source: str


_DOCS = "https://docs.cloud.google.com/tpu/docs/"
# v5e and v6e state both ways (400 and 800 GB/s); v4's is the all-reduce
# bandwidth of a pod, 1.1 PB/s, of each of its 4096 chips.
CHIPS = {
  "v4": Chip(275e12, 32 * 2**30, 1200e9, 268e9, f"{_DOCS}v4"),
  "v5e": Chip(197e12, 16e9, 819e9, 200e9, f"{_DOCS}v5e"),
  "v5p": Chip(459e12, 95e9, 2765e9, 600e9, f"{_DOCS}v5p"),
  "v6e": Chip(918e12, 32e9, 1638e9, 400e9, f"{_DOCS}v6e"),
}


def run(cfg: Config, workdir: pathlib.Path, topology: str) -> None:
  """Compiles for `topology`, shows what it costs, writes it as JSON.

  Args:
    cfg: of a run; train.batch_size is that of all devices together.
    workdir: gets compile_TOPOLOGY.json.
    topology: "cpu:8", or a TPU slice such as "v5e:16x16".

  Raises:
    UserError: there is no such topology, libtpu is missing, or the batch does
      not divide over its devices.
  """
  devices = parallel.topology_devices(topology)
  mesh = parallel.make_mesh(cfg.parallel.space, devices)
  parallel.check_batch_size(
    cfg.train.batch_size, mesh, "train.batch_size", cfg.train.accumulate
  )
  writers.log(f"compiling for {len(devices)} devices of {topology}")
  start = time.perf_counter()
  compiled = program.compile_train_step(cfg, mesh)
  seconds = time.perf_counter() - start
  chip = CHIPS.get(topology.partition(":")[0])
  found = describe(cfg, mesh, compiled, chip)
  sides = topology.partition(":")[2].split("x")
  longest = max(int(n) for n in sides)
  if chip:
    found["prediction"] = predict(found, chip, len(devices), longest)
  record = {"topology": topology, "devices": len(devices), **found}
  record["compile_seconds"] = round(seconds, 1)
  name = topology.replace(":", "_")
  workdir_lib.write_json(workdir / f"compile_{name}.json", record)
  writers.log(_text(record))
  writers.log(f"wrote {workdir / f'compile_{name}.json'}")


def describe(
  cfg: Config, mesh: Any, compiled: jax.stages.Compiled, chip: Chip | None
) -> dict[str, Any]:
  """What one device holds, computes, moves and says, as XLA counts it."""
  state, batch, _ = program.abstract_inputs(cfg, mesh)
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  peak = program.peak_bytes(compiled)
  return {
    "batch_size": cfg.train.batch_size,
    "bytes": {
      "parameters": _nbytes(state.params),
      "batch_statistics": _nbytes(state.batch_stats),
      "optimizer": _nbytes(state.opt_state),
      "averages": _nbytes(state.ema),
      "batch": _nbytes(batch) // mesh.shape["data"],
      "activations": memory.temp_size_in_bytes,
      "peak": peak,
    },
    "memory_bytes": chip.memory_bytes if chip else None,
    "fits": peak <= chip.memory_bytes if chip else None,
    "flops": cost["flops"],
    "bytes_moved": cost["bytes accessed"],
    "collectives": _collectives(compiled),
  }


def _collectives(compiled: jax.stages.Compiled) -> dict[str, Any] | None:
  """None where libtpu is newer than jaxlib, which then cannot print all."""
  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError:
    return None
  return hlo.count_collectives(text)


def _nbytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def predict(
  found: dict[str, Any], chip: Chip, devices: int, longest: int
) -> dict[str, Any]:
  """Seconds of a step, and how they grow with chips at equal work a chip.

  Args:
    found: as `describe` gives it.
    chip: its figures.
    devices: of the compiled program.
    longest: side of the compiled slice.
  """
  arithmetic = found["flops"] / chip.flops
  memory = found["bytes_moved"] / chip.memory_bandwidth

  if found["collectives"] is None:
    return {
      "arithmetic_seconds": arithmetic,
      "memory_seconds": memory,
      "collective_seconds": None,
      "efficiency": None,
      "source": chip.source,
    }

  def exchange(n: int, side: float) -> float:
    if n == 1:
      return 0.0
    total = 0.0
    for kind, sums in found["collectives"].items():
      factor = 2 * (n - 1) / n if kind == "all-reduce" else 1
      total += factor * sums["bytes"] / chip.link_bandwidth
      total += sums["count"] * side * _HOP_SECONDS
    return total

  step = max(arithmetic, memory)
  numbers = [2**k for k in range(int(math.log2(_MOST_CHIPS)) + 1)]
  return {
    "arithmetic_seconds": arithmetic,
    "memory_seconds": memory,
    "collective_seconds": exchange(devices, longest),
    "efficiency": {
      n: step / (step + exchange(n, math.sqrt(n))) for n in numbers
    },
    "source": chip.source,
  }


def _text(record: dict[str, Any]) -> str:
  """The record, for people."""
  sizes = {k: f"{v / 2**20:,.1f} MiB" for k, v in record["bytes"].items()}
  lines = [f"{record['devices']} devices of {record['topology']}, a device:"]
  lines += [f"  {name:17} {size:>15}" for name, size in sizes.items()]
  if record["fits"] is not None:
    there = record["memory_bytes"] / 2**20
    verdict = "fits" if record["fits"] else "DOES NOT FIT"
    lines.append(f"  {verdict} in {there:,.0f} MiB")
  lines.append(f"  {record['flops'] / 1e9:,.2f} GFLOP, ")
  lines[-1] += f"{record['bytes_moved'] / 1e9:,.2f} GB moved"
  if record["collectives"] is None:
    lines.append("  collectives unknown: this jaxlib cannot print the program")
  for kind, sums in sorted((record["collectives"] or {}).items()):
    lines.append(
      f"  {sums['count']} {kind}, {sums['bytes'] / 2**20:,.2f} MiB in all"
    )
  if predicted := record.get("prediction"):
    lines.append(
      "predicted from published peaks:"
      f" arithmetic {predicted['arithmetic_seconds'] * 1e3:.2f} ms,"
      f" memory {predicted['memory_seconds'] * 1e3:.2f} ms"
    )
    if predicted["efficiency"]:
      seconds = predicted["collective_seconds"]
      lines[-1] += f", collectives {seconds * 1e3:.2f} ms"
      shares = predicted["efficiency"].items()
      shown = "  ".join(f"{n}: {share:.1%}" for n, share in shares)
      lines.append(f"predicted efficiency by chips, equal work each: {shown}")
  return "\n".join(lines)
