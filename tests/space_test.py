"""Images that several devices share: the same numbers, half the memory."""

import re

import jax
import numpy as np
import pytest

from tests import runs
from tests.cluster_test import assert_near
from unet_jax import config as config_lib
from unet_jax import program
from unet_jax import workdir as workdir_lib
from unet_jax.runtime import parallel

# Up, norm, decoder and skip, each at least once for 2D and 3D.
NETWORKS = [
  (2, "transpose", "batch", "plain", "concat"),
  (2, "linear", "instance", "plain", "add"),
  (2, "linear_aligned", "group", "plain", "attn_oktay"),
  (2, "linear", "batch", "nested", "concat"),
  (2, "transpose", "none", "full_scale", "concat"),
  (3, "linear_aligned", "batch", "plain", "concat"),
  (3, "transpose", "instance", "plain", "respath"),
  (3, "linear", "group", "plain", "scse"),
]


def config_of(network, space, size, widths, **fields):
  dims, up, norm, decoder, skip = network
  config = config_lib.default_config()
  config.model.dims, config.model.up, config.model.norm = dims, up, norm
  config.model.decoder, config.model.skip = decoder, skip
  config.model.widths, config.model.norm_groups = widths, 1
  config.data.crop_size = (size,)
  config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.05
  config.optimizer.schedule, config.optimizer.clip_norm = "constant", 1.0
  config.train.batch_size, config.parallel.space = 4, space
  config.augment.turn = False  # Rotations reach across devices; a flip does.
  for key, value in fields.items():
    config_lib.override(config, key.replace("__", "."), str(value))
  return config_lib.parse(config)


def batch_of(cfg, step):
  rng = np.random.default_rng(step)
  n, size = cfg.train.batch_size, cfg.data.crop_size
  scale = np.arange(1, n + 1).reshape(-1, *(1,) * (len(size) + 1))
  image = rng.normal(size=(n, *size, 1)) * scale + scale
  return {
    "id": np.arange(n, dtype=np.int32) + step * n,
    "image": image,
    "label": (image[..., 0] > scale[..., 0]).astype(np.int32),
    "weight": rng.random((n, *size)),
    "valid": np.ones(n),
  }


def trajectory(cfg, mesh, state, num_steps):
  step = program._jit(cfg, mesh)
  state = jax.device_put(state, parallel.replicated(mesh))
  losses, rng = [], jax.random.key(3)
  for i in range(num_steps):
    batch = parallel.put_batch(batch_of(cfg, i), mesh)
    state, sums = step(state, batch, rng)
    losses.append(float(sums.loss.total))
  return jax.device_get(state), np.array(losses)


def some_slow(cases):
  """Every third runs with the fast tests; which is another for each test."""
  return [
    case if i % 3 == len(cases) % 3 else slow_case(case)
    for i, case in enumerate(cases)
  ]


def slow_case(case):
  values = case if isinstance(case[0], tuple) else (case,)
  return pytest.param(*values, marks=pytest.mark.slow)


# Losses that sort an image, or look for its borders, with those that do not.
SORTING = "focal,top_k,focal_tversky,lovasz,lovasz_hinge,boundary"


@pytest.mark.parametrize(
  ("network", "terms"),
  some_slow(
    [(n, "cross_entropy,dice") for n in NETWORKS] + [(NETWORKS[2], SORTING)]
  ),
  ids=str,
)
def test_ten_steps_are_those_of_whole_images(network, terms):
  """2 groups of 2 devices against 1 device, in float64: 1e-9."""
  with jax.enable_x64(True):
    cfg = config_of(network, 2, 8, (2, 3), loss__terms=terms)
    start = workdir_lib.init_state(cfg, parallel.make_mesh())
    start = jax.tree.map(
      lambda x: np.asarray(x, np.float64) if x.dtype.kind == "f" else x,
      jax.device_get(start),
    )
    one = parallel.make_mesh(1, jax.devices()[:1])
    shared = parallel.make_mesh(2, jax.devices()[:4])
    alone = config_of(network, 1, 8, (2, 3), loss__terms=terms)
    whole = trajectory(alone, one, start, 10)
    cut = trajectory(cfg, shared, start, 10)
  np.testing.assert_allclose(cut[1], whole[1], rtol=1e-9)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
    cut[0],
    whole[0],
  )
  assert abs(whole[1][-1] - whole[1][0]) > 1e-3, "it moves"


@pytest.mark.parametrize("network", some_slow(NETWORKS), ids=str)
def test_no_activation_is_gathered_and_memory_halves(network):
  """Only borders travel: what a device receives at once is small."""
  size = 32 if network[0] == 2 else 16
  memory = {}
  for space in (1, 2):
    cfg = config_of(network, space, size, (4, 8, 16))
    mesh = parallel.make_mesh(space, jax.devices()[: 2 * space])
    compiled = program.compile_train_step(cfg, mesh)
    memory[space] = compiled.memory_analysis().temp_size_in_bytes
  text = compiled.as_text()
  assert not re.findall(r" (?:all-gather|all-to-all)(?:-start)?\(", text)
  assert "collective-permute" in text
  assert memory[2] < 0.6 * memory[1], memory


def test_a_run_with_shared_images_is_that_of_one_device(tmp_path):
  """The command line: training, whole-image evaluation of 5 images."""
  sgd = ("--config.optimizer.name=sgd", "--config.optimizer.ema_decay=0")
  for name, devices, flags in (
    ("one", 1, ()),
    ("cut", 4, ("--config.parallel.space=2",)),
  ):
    argv = runs.arguments(tmp_path / name, *sgd, *flags)
    status, output = runs.finish(runs.start(*argv, devices=devices))
    assert status == 0, output
  assert_near(tmp_path / "cut", tmp_path / "one", 1e-4)


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ({"parallel.space": 3}, "does not divide"),
    ({"parallel.space": 2, "data.crop_size": "36"}, "nearest: 32"),
    ({"parallel.space": 2, "parallel.strategy": "pmap"}, "nearest: 1"),
    (
      {
        "parallel.space": 2,
        "model.padding": "valid",
        "data.crop_size": "92",
      },
      "padding='same'",
    ),
  ],
)
def test_what_does_not_divide_is_refused(tmp_path, flags, words):
  argv = [f"--config.{key}={value}" for key, value in flags.items()]
  if "data.crop_size" not in flags:
    argv.append("--config.data.crop_size=24")
  process = runs.start(
    *runs.arguments(tmp_path, "--config.model.widths=2,4,8,8", *argv), devices=8
  )
  status, output = runs.finish(process)
  assert status == 2, output
  assert words in output.splitlines()[-1]
