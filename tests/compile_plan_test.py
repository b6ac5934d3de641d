"""--mode compile: counts against what is known without it."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests import runs
from unet_jax import compile_plan
from unet_jax.inspect import hlo


def start(workdir, topology, *flags):
  return runs.start(
    *runs.arguments(workdir, *flags, mode="compile"), "--topology", topology
  )


def test_eight_cpus_that_are_not_here(tmp_path):
  """One device here; counts of the tiny network by hand."""
  status, output = runs.finish(start(tmp_path, "cpu:8"))
  assert status == 0, output
  record = json.loads((tmp_path / "compile_cpu_8.json").read_text())
  assert record["devices"] == 8 and record["fits"] is None
  size = record["bytes"]
  params = 463  # As the tiny run counts them.
  assert size["parameters"] == 4 * params
  # AdamW: two moments and a count; the averages hold the statistics too.
  assert 8 * params + 4 <= size["optimizer"] <= 8 * params + 16
  assert size["averages"] == size["parameters"] + size["batch_statistics"]
  # One image of 16 x 16 a device: image, label, weight; id, valid, stop.
  assert size["batch"] == 16 * 16 * 3 * 4 + 12
  held = sum(size[k] for k in ("parameters", "optimizer", "batch", "averages"))
  assert size["peak"] > held + size["activations"]
  assert record["flops"] > 2 * 57_856, "a forward pass, and more"
  # Every gradient crosses, in float32, and batch norm's sums.
  all_reduce = record["collectives"]["all-reduce"]
  assert 4 * params < all_reduce["bytes"] < 8 * params
  assert "prediction" not in record
  assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
  ("topology", "flags", "words"),
  [
    ("cpu:0", (), "cpu:N with N from 1"),
    ("gpu:8", (), "cpu:8, or a TPU slice"),
    ("v5e:", (), "cpu:8, or a TPU slice"),
    ("cpu:3", (), "batch_size=8 does not divide over 3 devices; nearest: 9"),
    ("cpu:8", ("--config.train.accumulate=2",), "in 2 microbatches"),
    ("cpu:8", ("--config.parallel.space=3",), "do not divide over"),
  ],
)
def test_what_cannot_be_compiled_is_refused(tmp_path, topology, flags, words):
  status, output = runs.finish(start(tmp_path, topology, *flags))
  assert status == 2, output
  errors = [x for x in output.splitlines() if x.startswith("error: ")]
  assert len(errors) == 1 and words in errors[0]


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is not None, reason="libtpu is here"
)
def test_tpu_needs_its_compiler(tmp_path):
  status, output = runs.finish(start(tmp_path, "v5e:2x2"))
  assert status == 2 and "pip install 'unet_jax[tpu]'" in output


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="no libtpu: [tpu]"
)
def test_a_slice_of_v5e(tmp_path):
  status, output = runs.finish(start(tmp_path, "v5e:2x2"), 600)
  assert status == 0, output
  record = json.loads((tmp_path / "compile_v5e_2x2.json").read_text())
  assert record["devices"] == 4 and record["fits"]
  assert record["prediction"]["efficiency"]["1"] == 1
  status, output = runs.finish(start(tmp_path, "v5e:3x5x7"))
  assert status == 2 and "error: --topology v5e:3x5x7" in output


# --- Collectives --------------------------------------------------------------

MESH, REPLICATED = ("x",), PartitionSpec()


def text_of(function, *shapes, out=REPLICATED):
  """The program on 8 devices, its inputs split along their first axis."""
  mesh = Mesh(np.array(jax.devices()), MESH)
  split = NamedSharding(mesh, PartitionSpec("x"))
  arrays = [
    jax.ShapeDtypeStruct(s, jnp.float32, sharding=split) for s in shapes
  ]
  fn = jax.jit(function, out_shardings=NamedSharding(mesh, out))
  return fn.lower(*arrays).compile().as_text()


def test_an_all_reduce_is_its_result():
  found = hlo.count_collectives(text_of(lambda x: x.sum(0), (16, 5, 3)))
  assert found == {"all-reduce": {"count": 1, "bytes": 5 * 3 * 4}}


def test_an_all_gather_is_the_whole_array():
  found = hlo.count_collectives(text_of(lambda x: x + 1, (16, 5)))
  assert found == {"all-gather": {"count": 1, "bytes": 16 * 5 * 4}}


def test_borders_are_permuted():
  def shift(x):
    return x + jnp.roll(x, 1, axis=0)

  text = text_of(shift, (16, 5), out=PartitionSpec("x"))
  found = hlo.count_collectives(text)
  assert set(found) == {"collective-permute"}
  assert found["collective-permute"]["bytes"] == 5 * 4


@pytest.mark.parametrize(
  ("line", "kind", "size"),
  [
    ("%a = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%b, %c)", "all-reduce", 28),
    ("%a = f32[8]{0} all-reduce-start(%b)", "all-reduce", 32),
    (
      "%a = (bf16[2,4]{1,0:T(8,128)}, bf16[16,4]{1,0}) all-gather-start(%b)",
      "all-gather",
      128,
    ),
    (
      "%a = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%b)",
      "collective-permute",
      12,
    ),
    ("ROOT %a = s8[6]{0} reduce-scatter(%b)", "reduce-scatter", 6),
  ],
)
def test_forms_of_other_compilers(line, kind, size):
  assert hlo.count_collectives(line) == {kind: {"count": 1, "bytes": size}}


def test_what_is_done_or_only_named_does_not_count():
  for line in (
    "%d = f32[8]{0} all-reduce-done(%a)",
    "%f = f32[8]{0} fusion(%all-reduce.3), calls=%c",
  ):
    assert hlo.count_collectives(line) == {}


# --- The prediction -----------------------------------------------------------


def test_the_prediction_is_its_formula():
  chip = compile_plan.Chip(1e12, 16e9, 1e9, 1e8, "here")
  found = {
    "flops": 2e9,  # 2 ms
    "bytes_moved": 5e6,  # 5 ms: what counts.
    "collectives": {
      "all-reduce": {"count": 2, "bytes": 100_000},
      "collective-permute": {"count": 1, "bytes": 10_000},
    },
  }
  got = compile_plan.predict(found, chip, devices=4, longest=2)
  assert got["arithmetic_seconds"] == pytest.approx(2e-3)
  assert got["memory_seconds"] == pytest.approx(5e-3)
  # 2 * 3/4 * 1 ms, 0.1 ms, and three times two hops of a microsecond.
  collective = 1.5e-3 + 0.1e-3 + 3 * 2e-6
  assert got["collective_seconds"] == pytest.approx(collective)
  assert got["efficiency"][1] == 1
  assert got["efficiency"][4] == pytest.approx(5e-3 / (5e-3 + collective))
  shares = list(got["efficiency"].values())
  assert shares == sorted(shares, reverse=True) and len(shares) == 9


def test_a_program_that_cannot_be_printed_has_no_collectives():
  found = {"flops": 1.0, "bytes_moved": 1.0, "collectives": None}
  chip = compile_plan.CHIPS["v5p"]
  assert compile_plan.predict(found, chip, 4, 2)["efficiency"] is None
