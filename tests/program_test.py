"""The compiled step: memory, donation, recomputation, per-device statistics."""

import re

import jax
import jax.flatten_util
import numpy as np
import pytest

from tests import runs
from unet_jax import config as config_lib
from unet_jax import program
from unet_jax import workdir as workdir_lib
from unet_jax.errors import UserError
from unet_jax.runtime import parallel

NUM_DEVICES = 8


def config_of(**fields):
  config = config_lib.default_config()
  config.model.widths, config.data.crop_size = (4, 8, 16), (32,)
  config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.1
  for key, value in fields.items():
    config_lib.override(config, key.replace("__", "."), str(value))
  return config_lib.parse(config)


def batch_of(cfg):
  rng = np.random.default_rng(0)
  n, size = cfg.train.batch_size, cfg.data.crop_size
  scale = np.arange(1, n + 1, dtype=np.float32).reshape(-1, 1, 1, 1)
  image = rng.normal(size=(n, *size, 1)).astype(np.float32) * scale
  return {
    "id": np.arange(n, dtype=np.int32),
    "image": image,
    "label": (image[..., 0] > scale[..., 0] / 2).astype(np.int32),
    "weight": np.ones((n, *size), np.float32),
    "valid": np.ones(n, np.float32),
  }


def one_step(cfg, num_devices=NUM_DEVICES):
  """(state before, state after, sums, the compiled step) of one step."""
  mesh = parallel.make_mesh(devices=jax.devices()[:num_devices])
  compiled = program.compile_train_step(cfg, mesh)
  step = program.make_executor(cfg, mesh, compiled)
  # Made twice: what NumPy has seen of an array cannot be written over.
  before = jax.device_get(workdir_lib.init_state(cfg, mesh))
  state = workdir_lib.init_state(cfg, mesh)
  batch = program.make_put(cfg, mesh)(batch_of(cfg))
  after, sums = step(state, batch, program.make_rng(cfg, mesh))
  return before, jax.device_get(after), jax.device_get(sums), (compiled, state)


def assert_near(a, b, bound=1e-6):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=bound, atol=bound), a, b
  )


# --- Memory -------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_the_state_is_written_over_without_a_copy(strategy):
  cfg = config_of(optimizer__ema_decay=0.9, parallel__strategy=strategy)
  *_, (compiled, state) = one_step(cfg)
  num_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
  assert compiled.memory_analysis().alias_size_in_bytes == num_bytes
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  # Nor does the program copy a kernel before it uses it.
  entry = compiled.as_text().partition("\nENTRY ")[2]
  given = set(re.findall(r"%?(\S+) = \S+ parameter\(", entry))
  copies = re.findall(r"= (\S+) copy\((?:\S+ )?%?([\w.]+)\)", entry)
  copied = [kind for kind, name in copies if name in given]
  assert len(given) > 180 and all(kind.count(",") == 0 for kind in copied)


@pytest.mark.parametrize(
  "decoder",
  [
    "plain",
    pytest.param("nested", marks=pytest.mark.slow),
    pytest.param("full_scale", marks=pytest.mark.slow),
  ],
)
def test_recomputing_keeps_less_and_changes_no_number(decoder):
  """What the backward pass is given; XLA on CPU merges the rest again."""
  results, kept = {}, {}
  for remat in ("none", "block", "level"):
    cfg = config_of(
      model__decoder=decoder,
      model__dropout=0.2,
      model__block_dropout=0.1,
      model__remat=remat,
    )
    _, after, sums, _ = one_step(cfg, 1)
    results[remat] = (after.params, after.batch_stats, sums.loss)
    model = workdir_lib.make_model(cfg)

    def residuals(params, image, model=model, stats=after.batch_stats):
      def apply(params):
        return model.apply(
          {"params": params, "batch_stats": stats},
          image,
          train=True,
          mutable=["batch_stats"],
          rngs={"dropout": jax.random.key(0)},
        )[0]

      return jax.vjp(apply, params)[1]

    shapes = jax.eval_shape(residuals, after.params, batch_of(cfg)["image"])
    kept[remat] = sum(x.size for x in jax.tree.leaves(shapes))
  assert_near(results["block"], results["none"])
  assert_near(results["level"], results["none"])
  assert kept["level"] < kept["block"] < 0.6 * kept["none"], kept


def test_microbatches_take_less_memory():
  temporary = {}
  for n in (1, 4):
    cfg = config_of(train__batch_size=8, train__accumulate=n)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    compiled = program.compile_train_step(cfg, mesh)
    temporary[n] = compiled.memory_analysis().temp_size_in_bytes
  assert temporary[4] < 0.5 * temporary[1], temporary


def test_a_plan_that_does_not_fit_is_refused_with_three_remedies(monkeypatch):
  cfg = config_of()
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  compiled = program.compile_train_step(cfg, mesh)
  need = program.peak_bytes(compiled)
  state, batch, _ = program.abstract_inputs(cfg, mesh)
  known = sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves((state, batch))
  )
  # Beside the arrays that go in: at least one activation of full resolution.
  assert need > known + 8 * 32 * 32 * 4 * 4
  monkeypatch.setattr(parallel, "memory_bytes", lambda mesh: need)
  assert "MiB are there" in program.check_memory(cfg, mesh, compiled)
  monkeypatch.setattr(parallel, "memory_bytes", lambda mesh: need - 1)
  with pytest.raises(UserError) as error:
    program.check_memory(cfg, mesh, compiled)
  text = str(error.value)
  assert text.count("; or ") == 2
  assert "config.train.accumulate=2" in text
  assert "remat" not in text, "XLA on CPU saves nothing by it"
  monkeypatch.setattr(parallel, "memory_bytes", lambda mesh: None)
  assert "are there" not in program.check_memory(cfg, mesh, compiled)


@pytest.mark.parametrize(
  ("fields", "first"),
  [
    ({"train__batch_size": 9}, "config.train.accumulate=3"),
    (
      {"train__batch_size": 8, "train__accumulate": 2},
      "config.train.accumulate=4",
    ),
    ({"train__batch_size": 1}, "config.model.remat=level"),
    (
      {
        "train__batch_size": 1,
        "model__padding": "valid",
        "data__crop_size": "92",
      },
      "config.model.remat=level",
    ),
    (
      {"train__batch_size": 1, "model__remat": "level"},
      "config.model.dtype=bfloat16",
    ),
  ],
)
def test_remedies_can_be_taken(fields, first):
  cfg = config_of(**fields)
  remedies = program._remedies(cfg, "tpu", num_devices=4)
  assert remedies[0].startswith(first)
  assert len(remedies) >= 3
  for remedy in remedies:
    key, _, value = remedy.split(" ")[0].removeprefix("config.").partition("=")
    config_of(**{**fields, key.replace(".", "__"): value})


def test_the_run_says_what_it_needs(tmp_path):
  process = runs.start(*runs.arguments(tmp_path, "--config.train.num_steps=3"))
  status, output = runs.finish(process)
  assert status == 0
  assert re.search(
    r"a step needs \d+ MiB of memory a device, [\d,]+ MiB", output
  )


@pytest.mark.slow
def test_bfloat16_is_the_same_step_in_both_strategies():
  """Within the rounding of bfloat16; the state stays float32."""
  results = {}
  for strategy in ("jit", "pmap"):
    cfg = config_of(model__dtype="bfloat16", parallel__strategy=strategy)
    before, after, sums, _ = one_step(cfg)
    floats = [x for x in jax.tree.leaves(after) if x.dtype.kind != "i"]
    assert all(x.dtype == np.float32 for x in floats)
    moved = jax.tree.map(lambda a, b: a - b, after.params, before.params)
    results[strategy] = jax.flatten_util.ravel_pytree(moved)[0], sums.loss
  (a, loss), (b, other) = results["jit"], results["pmap"]
  np.testing.assert_allclose(loss.total, other.total, rtol=1e-2)
  assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(a)


# --- Statistics of each device ------------------------------------------------


@pytest.mark.slow
def test_statistics_of_each_device_are_the_same_in_both_strategies():
  """norm_scope="device": as if every device had a network of its own."""
  cfg = config_of(model__norm_scope="device", train__batch_size=16)
  pmap = config_of(
    model__norm_scope="device",
    train__batch_size=16,
    parallel__strategy="pmap",
  )
  start, by_jit, sums, _ = one_step(cfg)
  _, by_pmap, other, _ = one_step(pmap)
  assert_near(by_jit.params, by_pmap.params, 2e-6)
  assert_near(by_jit.batch_stats, by_pmap.batch_stats, 1e-5)
  assert_near(sums.loss, other.loss, 1e-5)

  # The running statistics: the mean of what each device alone would have.
  model = workdir_lib.make_model(config_of())
  image = batch_of(cfg)["image"]
  plain = config_of(
    model__norm_scope="device",
    train__batch_size=16,
    augment__flip="false",
    augment__turn="false",
  )
  _, after, _, _ = one_step(plain)
  alone = [
    model.apply(
      {"params": start.params, "batch_stats": start.batch_stats},
      image[2 * i : 2 * i + 2],
      train=True,
      mutable=["batch_stats"],
    )[1]["batch_stats"]
    for i in range(NUM_DEVICES)
  ]
  mean = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *alone)
  assert_near(after.batch_stats, mean, 2e-5)

  # The global form, and another number of devices, give something else.
  _, everywhere, _, _ = one_step(config_of(train__batch_size=16))
  _, on_two, _, _ = one_step(cfg, 2)
  for different in (everywhere, on_two):
    a = by_jit.params["encoder_0"]["Conv_0"]["kernel"]
    b = different.params["encoder_0"]["Conv_0"]["kernel"]
    assert np.abs(a - b).max() > 1e-4


def test_one_device_has_the_global_statistics():
  for scope in ("global", "device"):
    _, after, _, _ = one_step(config_of(model__norm_scope=scope), 1)
    if scope == "global":
      expected = after
  assert_near(after.params, expected.params)
  assert_near(after.batch_stats, expected.batch_stats)
