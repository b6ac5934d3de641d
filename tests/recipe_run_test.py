"""One run with all that the paper's recipe, and rare classes, ask for."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from tests import runs, tiny
from unet_jax import config as config_lib
from unet_jax import evaluate, geometry, train
from unet_jax import workdir as workdir_lib
from unet_jax.data.synthetic import SyntheticSource
from unet_jax.errors import UserError
from unet_jax.models import build_model


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
  config = tiny.get_config()
  config.data.weight_map, config.data.separate = "instances", True
  config.data.foreground_share, config.augment.cutmix = 0.5, 0.5
  config.model.residual, config.model.stochastic_depth = True, 0.3
  config.loss.terms = ("cross_entropy", "lovasz", "boundary", "top_k")
  config.loss.weights = (1.0, 0.5, 0.01, 0.5)
  config.loss.balanced = True
  config.train.num_steps, config.train.eval_every = 6, 3
  config.runtime.map_cache = str(tmp_path_factory.mktemp("maps"))
  return config_lib.parse(config)


@pytest.fixture(scope="module")
def unbroken(cfg, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("unbroken")
  train.train_and_evaluate(cfg, workdir)
  return workdir


def test_a_resumed_run_is_the_same_run(cfg, unbroken, tmp_path):
  shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / "checkpoints" / "6")
  train.train_and_evaluate(cfg, tmp_path)
  runs.assert_same_run(unbroken, tmp_path, 6)


def test_class_weights_are_those_of_the_training_split(cfg, unbroken):
  source = SyntheticSource(cfg, "train", None)
  label = np.stack([source[i]["label"] for i in range(len(source))])
  balanced = workdir_lib.load_class_weights(cfg, unbroken)
  np.testing.assert_allclose(
    balanced.loss.class_weights,
    [label.size / 2 / (label == k).sum() for k in range(2)],
  )
  # Found by counting, not by the config: the run's own says nothing of them.
  assert workdir_lib.read_config(unbroken).loss.class_weights == ()


def test_evaluation_has_the_loss_of_the_run(cfg, unbroken):
  kept = [r for r in runs.read_metrics(unbroken) if r["split"] == "val"]
  by_step = {r["step"]: r for r in kept}
  evaluate.run(cfg, unbroken, step=6)
  scored = workdir_lib.read_json(unbroken / "evaluation_val.json", "")
  for name in ("loss", "dice"):
    np.testing.assert_allclose(scored[name], by_step[6][name], rtol=1e-6)


def test_without_the_counts_there_is_a_remedy(cfg, unbroken, tmp_path):
  shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
  (tmp_path / "class_weights.json").unlink()
  with pytest.raises(UserError, match=r"loss\.balanced=false"):
    evaluate.run(cfg, tmp_path)


def test_each_training_image_has_one_kept_map(cfg, unbroken):
  maps = list(pathlib.Path(cfg.runtime.map_cache).glob("*.npy"))
  assert len(maps) == cfg.data.synthetic_train
  assert {np.load(path).shape for path in maps} == {(16, 16)}


@pytest.mark.parametrize("decoder", ["plain", "nested"])
def test_stochastic_depth_reaches_every_block(decoder):
  fields = {"num_classes": 1, "widths": (2, 2, 2), "norm": "none"}
  fields |= {"residual": True, "decoder": decoder}
  x = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)
  model = build_model(**fields, stochastic_depth=0.5)
  plain = build_model(**fields)
  variables = jax.jit(plain.init)(jax.random.key(0), x)

  @jax.jit
  def branches(key):
    _, state = model.apply(
      variables,
      x,
      train=True,
      rngs={"dropout": key},
      mutable=["intermediates"],
      capture_intermediates=lambda module, _: "DropBranch" in str(module.name),
    )
    return jax.tree.leaves(state["intermediates"])

  dropped = [
    np.all(np.asarray(y) == 0, axis=(1, 2, 3))
    for key in jax.random.split(jax.random.key(1), 4)
    for y in branches(key)
  ]
  blocks = 5 if decoder == "plain" else 6
  assert len(dropped) == 4 * blocks
  assert 0.3 < np.mean(dropped) < 0.75
  # Each block and each example draws its own.
  assert len({tuple(d) for d in dropped}) > len(dropped) / 2
  np.testing.assert_array_equal(
    jax.jit(model.apply)(variables, x), jax.jit(plain.apply)(variables, x)
  )


@pytest.mark.parametrize("size", ["paper", "small"])
def test_the_config_has_the_numbers_of_the_paper(size):
  config = config_lib.load_config(f"configs/unet2015.py:{size}")
  config.data.dir = "somewhere"
  cfg = config_lib.parse(config)
  # Figure 1; sections 3 and 3.1; equation 2.
  tile, rule = cfg.data.crop_size[0], cfg.model.size_rule
  assert (tile, geometry.output_size(tile, cfg.model.depth, rule)) == (572, 388)
  assert (cfg.model.norm, cfg.model.residual, cfg.model.up) == (
    *("none", False, "transpose"),
  )
  assert cfg.train.batch_size == 1 and cfg.model.dropout > 0
  assert (cfg.optimizer.name, cfg.optimizer.momentum) == ("sgd", 0.99)
  assert (cfg.data.w0, cfg.data.sigma) == (10, 5)
  assert (cfg.augment.elastic, cfg.augment.elastic_grid) == (10, 3)
  assert min(cfg.augment.shift, cfg.augment.rotate, cfg.augment.brightness) > 0
  assert cfg.loss.terms == ("cross_entropy",) and cfg.loss.balanced
  widths = np.array(cfg.model.widths)
  factor = 1 if size == "paper" else 8
  np.testing.assert_array_equal(factor * widths, 64 * 2 ** np.arange(5))
